from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from haloformer.data_pipeline.order import EpochOrder, Permutation, Point, share_of_stream


def order_of(counts: list[list[int]], **options: object) -> EpochOrder:
    """An order over shards whose documents have these token counts."""
    lengths = [np.array(shard, np.int64) for shard in counts]
    settings: dict[str, object] = {"seed": 7, "epoch": 0, "shuffle_block": 2, **options}
    return EpochOrder(
        np.array([len(shard) for shard in counts], np.int64),
        np.array([sum(shard) for shard in counts], np.int64),
        lengths.__getitem__,
        **settings,  # type: ignore[arg-type]
    )


def random_counts(seed: int, num_shards: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 30, draw.integers(0, 12)).tolist() for _ in range(num_shards)]


def all_documents(order: EpochOrder) -> list[tuple[int, int]]:
    shards, samples = order.documents(0, order.num_documents)
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


def test_permutation_is_a_bijection_for_every_size() -> None:
    for size in [*range(1, 70), 255, 256, 257, 1000, 4097]:
        images = Permutation(size, (3, 1, size))(np.arange(size))
        assert sorted(images.tolist()) == list(range(size)), size


def test_permutation_of_a_huge_range_needs_no_list_of_it() -> None:
    size = 10**15
    images = Permutation(size, (1,))(np.arange(1000))
    assert len(set(images.tolist())) == 1000
    assert images.max() < size and images.max() > size // 2


def test_permutation_moves_each_element_everywhere() -> None:
    # Over 2,000 keys every element lands on every place about equally often.
    hits = np.zeros((6, 6), int)
    for key in range(2000):
        hits[np.arange(6), Permutation(6, (key,))(np.arange(6))] += 1
    assert abs(hits - 2000 / 6).max() < 100


@pytest.mark.parametrize("shuffle_block", [1, 2, 3, 100])
def test_every_document_stands_in_the_order_once(shuffle_block: int) -> None:
    counts = random_counts(1, 9)
    order = order_of(counts, shuffle_block=shuffle_block)
    expected = [(s, d) for s, shard in enumerate(counts) for d in range(len(shard))]
    assert sorted(all_documents(order)) == expected


def test_order_depends_on_seed_and_epoch_only() -> None:
    counts = random_counts(2, 9)
    base = all_documents(order_of(counts))
    assert all_documents(order_of(counts)) == base
    assert all_documents(order_of(counts, epoch=1)) != base
    assert all_documents(order_of(counts, seed=8)) != base


def test_block_of_one_reads_tars_straight_through() -> None:
    counts = [[5] * 4, [5] * 3, [5] * 6]
    documents = all_documents(order_of(counts, shuffle_block=1))
    shards = list(dict.fromkeys(shard for shard, _ in documents))
    assert documents == [(shard, d) for shard in shards for d in range(len(counts[shard]))]


def test_shards_come_in_another_order_each_epoch() -> None:
    counts = [[5] for _ in range(20)]
    orders = {tuple(all_documents(order_of(counts, shuffle_block=1, epoch=e))) for e in range(5)}
    assert len(orders) == 5


def test_a_block_mixes_its_shards_and_no_others() -> None:
    counts = [[5] * 8 for _ in range(6)]
    documents = all_documents(order_of(counts, shuffle_block=2))
    for start in range(0, 48, 16):
        block = [shard for shard, _ in documents[start : start + 16]]
        assert len(set(block)) == 2
        assert len(set(block[:8])) == 2, "documents of a block are not mixed"


def test_documents_can_be_asked_in_any_portions() -> None:
    order = order_of(random_counts(3, 9), shuffle_block=3)
    whole = all_documents(order)
    for first in range(0, len(whole), 5):
        shards, samples = order.documents(first, 7)
        portion = list(zip(shards.tolist(), samples.tolist(), strict=True))
        assert portion == whole[first : first + 7]


@pytest.mark.parametrize("shuffle_block", [1, 2, 100])
def test_points_are_where_counting_slots_leads(shuffle_block: int) -> None:
    counts = random_counts(4, 7)
    order = order_of(counts, shuffle_block=shuffle_block)
    line = []
    for position, (shard, sample) in enumerate(all_documents(order)):
        line += [Point(position, offset) for offset in range(counts[shard][sample])]
        line.append(Point(position + 1, 0))
    line.append(Point(order.num_documents, 0))
    assert order.points(range(order.num_slots + 1)) == line


def test_shares_join_without_gap_and_differ_by_one_slot() -> None:
    for num_streams in (1, 3, 8):
        cuts = [share_of_stream(i, num_streams, 100) for i in range(num_streams)]
        assert [cut[0] for cut in cuts] + [100] == [0] + [cut[1] for cut in cuts]
        sizes = {stop - start for start, stop in cuts}
        assert max(sizes) - min(sizes) <= 1


def test_order_of_a_hundred_million_documents_fits_in_small_memory() -> None:
    num_shards, per_shard = 2000, 50_000
    lengths = np.full(per_shard, 100, np.int64)
    samples = np.full(num_shards, per_shard, np.int64)
    tracemalloc.start()
    order = EpochOrder(samples, samples * 100, lambda _: lengths, seed=0, epoch=3, shuffle_block=4)
    start, stop = share_of_stream(1234, 4096, order.num_slots)
    assert order.points([start, stop])[0].position > 0
    assert len(order.documents(order.num_documents - 10, 32)[0]) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
