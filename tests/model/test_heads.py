"""What the heads compute, by hand; and what the character model may see."""

import math

import pytest
import torch

from haloformer.configs.schema import CharLmConfig
from haloformer.model.char_lm import CharLm, rotate
from haloformer.model.coreference import (
    CorefOutput,
    antecedent_loss,
    gold_clusters,
    predicted_clusters,
)
from haloformer.model.question_answering import or_softmax_loss
from model_layouts import LENGTH, VOCAB, build, char_config, source


def test_or_softmax_lets_mass_go_to_any_answer():
    logits = torch.randn(1, 5, 2, dtype=torch.float64)
    spans = torch.tensor([[[1, 2], [3, 3], [-1, -1]]])
    losses, answered = or_softmax_loss(logits, spans)
    chances = torch.softmax(logits[0], dim=0)
    assert losses[0, 0].item() == pytest.approx(-math.log(chances[1, 0] + chances[3, 0]))
    assert losses[0, 1].item() == pytest.approx(-math.log(chances[2, 1] + chances[3, 1]))
    assert answered.tolist() == [[1.0, 1.0]]


def test_or_softmax_is_zero_without_an_answer_and_ignores_padding():
    logits = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    spans = torch.tensor([[[-1, -1]], [[1, 4]]])  # the second answer ends on padding
    losses, answered = or_softmax_loss(logits, spans, mask)
    losses.sum().backward()
    assert losses[0].tolist() == [0.0, 0.0] and losses[1, 1] == 0.0
    assert answered.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    expected = torch.nn.functional.cross_entropy(logits[1:, :3, 0], torch.tensor([1]))
    torch.testing.assert_close(losses[1, 0], expected)
    assert not logits.grad[0].any() and not logits.grad[1, 3:].any()


def test_coreference_loss_sums_over_the_gold_antecedents():
    spans = torch.tensor([[[0, 0], [2, 3], [5, 5], [7, 7]]])
    labels = torch.tensor([[[0, 0, 4], [5, 5, 4], [7, 7, 4], [-1, -1, -1]]])
    clusters = gold_clusters(spans, torch.ones(1, 4, dtype=torch.bool), labels)
    assert clusters.tolist() == [[4, -1, 4, 4]]
    antecedents = torch.tensor([[[1, 2, 3], [0, 2, 3], [1, 0, 3], [2, 1, 0]]])
    never = -math.inf
    scores = torch.tensor(
        [[[0, never, never, never], [0, 1, never, never], [0, 2, 3, never], [0, 1, 2, 3]]]
    )
    loss = antecedent_loss(scores.double(), antecedents, clusters)[0]
    e = [math.exp(x) for x in range(4)]
    assert loss.tolist() == pytest.approx(
        [
            0.0,  # the first of its cluster: no antecedent
            math.log(1 + e[1]),  # no mention: no antecedent either
            math.log(1 + e[2] + e[3]) - 3,
            math.log(1 + e[1] + e[2] + e[3]) - math.log(e[1] + e[3]),
        ]
    )


def test_coreference_clusters_follow_the_best_antecedents():
    output = CorefOutput(
        loss_sum=torch.zeros(()),
        spans=torch.tensor([[[0, 0], [2, 3], [5, 5], [7, 7]]]),
        span_mask=torch.tensor([[True, True, True, True]]),
        antecedents=torch.tensor([[[1, 2], [0, 2], [1, 0], [2, 1]]]),
        scores=torch.tensor([[[0.0, -1, -1], [0, -1, -1], [0, -1, 2], [0, 1, 0.5]]]),
    )
    assert predicted_clusters(output) == [[[(0, 0), (5, 5), (7, 7)]]]


def test_coreference_keeps_spans_of_real_tokens_in_order_of_the_text():
    model = build("coreference")
    ids, shard = source()
    output = model(ids, torch.full((3, 1, 3), -1), shard)
    lengths = shard.attention_mask.sum(1)
    for b in range(3):
        spans = output.spans[b][output.span_mask[b]].tolist()
        # Half as many as tokens, whatever the padding.
        assert len(spans) == lengths[b] // 2 and spans == sorted(spans)
        assert all(0 <= first <= last < lengths[b] and last - first < 8 for first, last in spans)


def changed_by(model, position):
    """Rows whose logits change with the token at a position."""
    ids, shard = source()
    outputs = []
    for shift in (0, 1):
        ids[0, position] = 3 + (ids[0, position] - 3 + shift) % (VOCAB - 3)
        outputs.append(model(ids, torch.zeros_like(ids), shard).logits.view(*ids.shape, -1)[0])
    return (outputs[0] != outputs[1]).any(-1).nonzero().flatten().tolist()


def test_character_model_sees_its_window_to_the_left_only():
    torch.manual_seed(0)
    config = char_config(num_layers=1, attention_window=[8], dilation=[1])
    assert changed_by(CharLm(config, VOCAB), 10) == [10, 11, 12, 13, 14]


def test_two_heads_of_the_character_model_are_dilated():
    torch.manual_seed(0)
    config = char_config(num_layers=1, attention_window=[4], dilation=[4])
    assert config.dilation_of_layer(0) == (1, 1, 4, 4)
    # two steps of one and two steps of four to the left
    assert changed_by(CharLm(config, VOCAB), 10) == [10, 11, 12, 14, 18]


def test_rotary_scores_depend_on_the_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = [
        (rotate(query, 20 + shift) * rotate(key, 13 + shift)).sum().item() for shift in (0, 5, 999)
    ]
    assert scores == pytest.approx([scores[0]] * 3)
    assert (rotate(query, 20) * rotate(key, 14)).sum().item() != pytest.approx(scores[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_window": [4]}, "attention_window has 1 entries for 2 layers"),
        ({"attention_window": 5}, "attention_window 5 is odd"),
        ({"hidden_size": 20}, "not a multiple of 2 x num_heads 4"),
        ({"num_dilated_heads": 5}, "num_dilated_heads 5 is more than num_heads 4"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_character_model_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CharLmConfig(**{**char_config().model_dump(), **change})
    assert char_config().max_positions == LENGTH
