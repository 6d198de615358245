"""Several corpora by weight: exact shares, the same batches on any ranks, exact resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from haloformer.data_pipeline.blend import Blend, Corpus
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.seq2seq import PairTrainStream
from haloformer.data_pipeline.stream import CausalTrainStream, TrainStream
from haloformer.data_pipeline.tokenizers import train_bpe

GLOBAL_BATCH = 4
WEIGHTS = [(0.7, 0.3), (1.0, 1.0, 2.0), (1e-3, 5.0)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 144])
def test_every_slot_and_every_step_gets_its_share(weights, batch) -> None:
    blend, steps = Blend(weights, seed=9), 2000
    # 8 and 144 are Fibonacci numbers, next to whole turns of the golden ratio.
    fed = np.array([[blend.corpus(step, slot) for slot in range(batch)] for step in range(steps)])
    for corpus, weight in enumerate(weights):
        share = weight / sum(weights)
        ours = fed == corpus
        # Chance would be off by sqrt(n * share * (1 - share)), 20 of 2000 and 6 of 144.
        counts = np.cumsum(ours, axis=0) - share * np.arange(1, steps + 1)[:, None]
        assert np.abs(counts).max() < 4.5
        assert np.abs(ours.sum(1) - share * batch).max() < 3.5
        assert abs(ours.sum() - share * ours.size) < 20


def test_the_seed_decides_and_scaling_all_weights_changes_nothing() -> None:
    def fed(weights, seed):
        blend = Blend(weights, seed)
        return [blend.corpus(step, slot) for step in range(50) for slot in range(3)]

    assert fed((1.0, 3.0), 4) == fed((2.0, 6.0), 4) != fed((1.0, 3.0), 5)
    assert set(fed((1.0,), 4)) == {0}


@pytest.fixture(params=[TrainStream, CausalTrainStream, PairTrainStream])
def blended(request, make_dataset, make_pairs, make_config):
    """Opens the ranks of a blend of three corpora, the second twice as heavy."""
    if request.param is PairTrainStream:
        folders = [make_pairs(n, name=f"part{n}") for n in (5, 17, 9)]
        changes = {"target_len": 16}
    else:
        documents = [[40, 3, 90, 1], [200], [8] * 30]
        folders = [make_dataset(d, name=f"part{n}") for n, d in enumerate(documents)]
        changes = {}
    corpora = [Corpus(f, w) for f, w in zip(folders, (1.0, 2.0, 1.0), strict=True)]

    def open_ranks(world: int, parts: list[Corpus] = corpora, **options):
        config = make_config(**changes, **options)
        place = {"seed": 5, "global_batch": GLOBAL_BATCH, "data_world": world}
        return [request.param(parts, config, data_rank=r, **place) for r in range(world)]

    open_ranks.corpora = corpora
    return open_ranks


def union(streams) -> dict[str, list[int]]:
    return {key: value for stream in streams for key, value in stream.state_dict().items()}


def global_batch(streams) -> dict[int, tuple]:
    """Slot -> text and labels, without padding, and which text it is."""
    slots = {}
    for stream in streams:
        batch = stream.next_batch()
        where = batch.spans if hasattr(batch, "spans") else batch.keys
        for row, slot in enumerate(batch.sample_ids.tolist()):
            ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
            labels = batch.labels[row][batch.labels[row] != -100].tolist()
            slots[slot] = (ids, labels, where[row])
    return slots


def test_any_number_of_ranks_and_workers_sees_the_same_batches(blended) -> None:
    worlds = [blended(1), blended(2), blended(4), blended(1, workers=3), blended(2, workers=2)]
    for _ in range(30):
        first, *others = [global_batch(streams) for streams in worlds]
        assert all(other == first for other in others)
        assert all(union(streams) == union(worlds[0]) for streams in worlds)


def test_resume_continues_identically_on_other_ranks(blended) -> None:
    run = blended(2)
    states, batches = [], []
    for _ in range(16):
        states.append(union(run))
        batches.append(global_batch(run))
    for step in range(0, 16, 3):
        again = blended(4 if step % 2 else 1)
        for stream in again:
            stream.load_state(states[step])
        for expected in batches[step : step + 3]:
            assert global_batch(again) == expected


def test_every_corpus_is_read_once_per_epoch(make_dataset, make_config) -> None:
    documents = {"one": [40, 3, 90, 1], "two": [200, 7], "three": [8] * 30}
    folders = {name: make_dataset(lengths, name=name) for name, lengths in documents.items()}
    corpora = [Corpus(f, w) for f, w in zip(folders.values(), (1.0, 2.5, 1.0), strict=True)]
    stream = TrainStream(corpora, make_config(), seed=5, global_batch=2, data_rank=0, data_world=1)
    blend = Blend([corpus.weight for corpus in corpora], seed=5)
    read = [Counter() for _ in corpora]
    for step in range(80):
        for slot, spans in enumerate(stream.next_batch().spans):
            for span in spans:
                tokens = range(span.start, span.stop)
                read[blend.corpus(step, slot)].update((span[:3], token) for token in tokens)
    for counts, lengths in zip(read, documents.values(), strict=True):
        assert set(counts.values()) == {1}
        for epoch in range(2):
            assert sum(place[0] == epoch for place, _ in counts) == sum(lengths)


def test_sequences_of_two_corpora_have_masks_of_their_own(make_dataset, make_config) -> None:
    corpora = [Corpus(make_dataset([3000], name=name)) for name in ("one", "two")]
    stream = TrainStream(
        corpora, make_config(), seed=5, global_batch=2, data_rank=0, data_world=1
    )  # fmt: skip
    rows = [row for _ in range(20) for row in stream.next_batch().labels]
    masks = {tuple(np.flatnonzero(row != -100)) for row in rows}
    assert len(masks) == len(rows) == 40


def test_identity_names_every_corpus_and_its_weight(blended) -> None:
    corpora = blended.corpora
    base = blended(1)[0].identity()
    assert all(load_index(c.folder).sha256 in base["data_sha256"] for c in corpora)
    heavier = [corpora[0]._replace(weight=1.5), *corpora[1:]]
    for other in (heavier, corpora[:2], corpora[::-1]):
        assert blended(1, other)[0].identity() != base
    # A corpus alone is what it was before there were blends.
    alone = blended(1, corpora[:1])[0].identity()
    assert alone["data_sha256"] == load_index(corpora[0].folder).sha256


def test_a_state_of_other_corpora_is_refused_and_changes_nothing(blended) -> None:
    stream = blended(1)[0]
    global_batch([stream])
    before = stream.state_dict()
    fewer = blended(1, blended.corpora[:2])[0].state_dict()
    with pytest.raises(DataError, match="state"):
        stream.load_state(fewer)
    assert stream.state_dict() == before


def test_characters_per_token_are_those_of_the_blend(make_dataset, make_config) -> None:
    ascii_, umlauts = make_dataset(["a" * 50], name="a"), make_dataset(["\u00e4" * 50], name="b")
    stream = TrainStream(
        [Corpus(ascii_, 3.0), Corpus(umlauts, 1.0)],
        make_config(), seed=5, global_batch=2, data_rank=0, data_world=1,
    )  # fmt: skip
    assert stream.facts.characters_per_token == pytest.approx(0.75 * 1.0 + 0.25 * 0.5)


def test_corpora_of_two_tokenizers_are_refused(make_dataset, make_config) -> None:
    first = make_dataset([50])
    trained = train_bpe(["some text to learn from " * 20], 300)
    second = make_dataset(["other text"], name="other", tokenizer=trained)
    with pytest.raises(DataError, match=f"the corpus {first}: tokenizer .* did not make .*other"):
        TrainStream(
            [Corpus(first), Corpus(second)],
            make_config(), seed=5, global_batch=2, data_rank=0, data_world=1,
        )  # fmt: skip
