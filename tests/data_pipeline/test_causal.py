"""Causal labels: the next token of the text, and the same batches as for masking otherwise."""

from __future__ import annotations

import numpy as np

from haloformer.data_pipeline.stream import (
    CausalEvalStream,
    CausalTrainStream,
    TrainStream,
)

RANK = {"global_batch": 2, "data_rank": 0, "data_world": 1}


def test_every_text_token_is_the_label_of_the_one_before_it(make_dataset, make_config) -> None:
    folder = make_dataset(["abc", "defgh " * 20])
    stream = CausalTrainStream(folder, make_config(), seed=1, pad_multiple=5, **RANK)
    specials = stream.tokenizer.specials
    for _ in range(4):
        batch = stream.next_batch()
        assert batch.input_ids.shape == (2, 35)
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            text = ~np.isin(ids, specials)
            assert not text[0] and text.sum() > 20
            assert (labels[:-1][text[1:]] == ids[1:][text[1:]]).all()
            assert (labels != -100).sum() == text.sum()
            assert specials.mask not in ids


def test_only_inputs_and_labels_differ_from_masking(make_dataset, make_config) -> None:
    folder = make_dataset([40, 3, 120, 64])
    causal = CausalTrainStream(folder, make_config(), seed=1, **RANK)
    masked = TrainStream(folder, make_config(), seed=1, **RANK)
    for _ in range(5):
        a, b = causal.next_batch(), masked.next_batch()
        assert a.spans == b.spans and (a.attention_mask == b.attention_mask).all()
        chosen = b.labels != -100
        assert (a.input_ids == np.where(chosen, b.labels, b.input_ids)).all()
        assert causal.state_dict() == masked.state_dict()


def test_a_document_does_not_predict_the_one_after_it(make_dataset, make_config) -> None:
    folder = make_dataset([10] * 4, name="eval")
    stream = CausalEvalStream(folder, make_config(isolate_documents=True), **RANK)
    (batch,) = stream
    assert batch.segment_ids is not None
    targets = batch.labels != -100
    rows, places = np.nonzero(targets)
    segments = batch.segment_ids
    assert (segments[rows, places] == segments[rows, places + 1]).all()
    assert targets.sum() == 40  # <s> tells the first of each
