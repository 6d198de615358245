from __future__ import annotations

import numpy as np
import pytest

from haloformer.data_pipeline.mlm import IGNORED, Masker, MaskKey
from haloformer.data_pipeline.tokenizers import ByteTokenizer

SPECIALS = ByteTokenizer.specials
KEY = MaskKey(seed=3, epoch=1, stream=2, sequence=5)


def masker(probability: float = 0.15) -> Masker:
    return Masker(ByteTokenizer.vocab_size, SPECIALS, probability)


def text(length: int = 50_000) -> np.ndarray:
    ids = np.random.default_rng(0).integers(4, 260, length)
    ids[0], ids[-100:-50], ids[-50:] = SPECIALS.bos, SPECIALS.eos, SPECIALS.pad
    return ids


def test_shares_are_15_percent_and_80_10_10() -> None:
    ids = text()
    inputs, labels = masker()(ids, KEY)
    chosen = labels != IGNORED
    assert abs(chosen.mean() - 0.15) < 0.01
    is_mask = inputs[chosen] == SPECIALS.mask
    kept = inputs[chosen] == ids[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.02
    assert abs(kept.mean() - 0.1) < 0.02
    replaced = inputs[chosen][~is_mask & ~kept]
    assert len(set(replaced.tolist())) > 200, "random tokens come from the whole vocabulary"
    assert np.isin(replaced, np.arange(4, 260)).all(), "and are never special"


def test_labels_hold_the_text_and_everything_else_is_untouched() -> None:
    ids = text()
    inputs, labels = masker()(ids, KEY)
    chosen = labels != IGNORED
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])


def test_specials_and_padding_are_never_targets() -> None:
    ids = text()
    _, labels = masker(0.99)(ids, KEY)
    assert (labels[np.isin(ids, SPECIALS)] == IGNORED).all()


@pytest.mark.parametrize("field", MaskKey._fields)
def test_each_part_of_the_key_changes_the_mask(field: str) -> None:
    ids = text()
    other = KEY._replace(**{field: getattr(KEY, field) + 1})
    assert np.array_equal(masker()(ids, KEY)[1], masker()(ids, KEY)[1])
    assert not np.array_equal(masker()(ids, KEY)[1], masker()(ids, other)[1])


def test_masks_stay_what_they_were() -> None:
    # Philox words are stable over NumPy versions; a run must continue with the masks it began with.
    ids = np.arange(4, 44)
    targets = [5, 8, 18, 20, 28, 29, 30]
    inputs, labels = masker()(ids, KEY)
    assert np.flatnonzero(labels != IGNORED).tolist() == targets
    assert inputs[targets].tolist() == [260, 224, 131, 260, 260, 260, 260]


def test_padding_changes_no_mask() -> None:
    # How far a row is padded depends on the number of context-parallel ranks.
    ids = text()
    inputs, labels = masker()(ids, KEY)
    for width in (1, 2, 5):
        padded = np.concatenate([ids, np.full(width, SPECIALS.pad)])
        wider = masker()(padded, KEY)
        assert np.array_equal(wider[0][: len(ids)], inputs)
        assert np.array_equal(wider[1][: len(ids)], labels)


def test_a_sequence_with_any_text_has_a_target() -> None:
    ids = np.array([SPECIALS.bos, 70, SPECIALS.eos, SPECIALS.pad])
    for sequence in range(50):
        _, labels = masker(0.01)(ids, KEY._replace(sequence=sequence))
        assert labels.tolist() == [IGNORED, 70, IGNORED, IGNORED]
    _, labels = masker()(np.full(8, SPECIALS.pad), KEY)
    assert (labels == IGNORED).all()
