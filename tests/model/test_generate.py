"""LED generation equals transformers token for token, on random and on trained weights."""

import pytest
import torch
import transformers

import hf_peers
from dist import run_ranks
from generation_ranks import sharded_answers
from haloformer.model.convert import load_pretrained
from haloformer.model.generate import SearchSettings, repeats

SETTINGS = {
    "greedy": {},
    "greedy_no_repeat": {"no_repeat_ngram_size": 2},
    "greedy_min": {"min_length": 9},
    "beams": {"num_beams": 4},
    "beams_long": {"num_beams": 4, "length_penalty": 2.0, "min_length": 6},
    "beams_short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "beams_no_repeat": {"num_beams": 4, "no_repeat_ngram_size": 2, "early_stopping": True},
}
MAX_LENGTH = 16


def peer_model(seed, *, random=True):
    config = transformers.LEDConfig(**{**hf_peers.LED, "init_std": 0.1})
    torch.manual_seed(seed)
    peer = transformers.LEDForConditionalGeneration(config)
    if random:
        hf_peers.scrambled(peer, seed)
        # The end token has to come by itself now and then, or every answer runs to its limit.
        peer.final_logits_bias[0, 2] = 5.0
    return peer


def marked(lengths, seed):
    """Sources that are full of one of four tokens: 3, 4, 5 or 6. Which one, per row."""
    ids, mask, chosen = hf_peers.batch(lengths, [[0]] * len(lengths), seed=seed)
    kinds = ids[:, 0] % 4
    fill = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    ids = torch.where(fill & mask.bool(), 3 + kinds[:, None], ids)
    return (ids, mask, chosen), kinds.tolist()


def trained(peer):
    """Some steps on answering kind k by k + 2 times the token 10 + k: likely, of four lengths."""
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-2)
    for step in range(80):
        (ids, mask, chosen), kinds = marked([20, 13, 17, 9, 21, 11], step)
        labels = torch.full((6, 8), -100)
        for row, kind in enumerate(kinds):
            labels[row, : kind + 2] = 10 + kind
            labels[row, kind + 2] = 2
        peer(ids, mask, global_attention_mask=chosen, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peer


@pytest.fixture(scope="module", params=["random", "trained"])
def pair(request, tmp_path_factory):
    peer = peer_model(4, random=request.param == "random")
    if request.param == "trained":
        trained(peer.train())
    peer.eval()
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    return peer, load_pretrained(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_transformers(name, pair):
    peer, ours = pair
    for seed in range(3):
        ids, mask, chosen = hf_peers.batch([21, 14, 30, 9], [[0], [0, 5], [], [3]], seed=seed)
        ids[:2] = marked([21, 14, 30, 9], seed)[0][0][:2]
        expected = peer.generate(
            ids,
            attention_mask=mask,
            global_attention_mask=chosen,
            max_length=MAX_LENGTH,
            do_sample=False,
            **SETTINGS[name],
        )
        found = ours.generate(ids, mask, chosen, max_length=MAX_LENGTH, **SETTINGS[name])
        assert found.tolist() == expected.tolist()


def test_these_answers_end_by_themselves_at_several_lengths(pair):
    batch, _ = marked([21, 14, 30, 9, 25, 11, 17, 28], 1000)
    answers = pair[1].generate(*batch, max_length=MAX_LENGTH, num_beams=4).tolist()
    assert len({row.count(1) for row in answers}) > 1
    assert len({tuple(row) for row in answers}) > 2


def test_global_mask_is_in_force(tmp_path):
    peer_model(4).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ids, mask, chosen = hf_peers.batch([30, 29, 28, 27], [[0, 7, 20]] * 4)
    settings = {"max_length": MAX_LENGTH, "min_length": 8}
    local = ours.generate(ids, mask, None, **settings)
    assert ours.generate(ids, mask, chosen, **settings).tolist() != local.tolist()


def test_encoder_may_be_sharded(tmp_path):
    peer = peer_model(4)
    peer.save_pretrained(tmp_path)
    batch = hf_peers.batch([32, 14, 21], [[0], [], [20]])
    settings = [{}, {"num_beams": 4}]
    expected = [
        load_pretrained(tmp_path).generate(*batch, max_length=MAX_LENGTH, **each)
        for each in settings
    ]
    for answers in run_ranks(2, sharded_answers, str(tmp_path), batch, settings, MAX_LENGTH):
        assert [a.tolist() for a in answers] == [e.tolist() for e in expected]


def test_repeats_names_the_tokens_that_would_complete_an_ngram():
    assert repeats([5, 6, 7, 5], 2) == [6]
    assert repeats([5, 6, 7, 5, 6], 3) == [7]
    assert repeats([5, 6], 3) == []
    assert repeats([5, 6, 5], 1) == [5, 6, 5]


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_beams 0 is less than 1"):
        SearchSettings(num_beams=0)
    with pytest.raises(ValueError, match="min_length 9 is more than max_length 5"):
        SearchSettings(min_length=9, max_length=5)
    peer_model(0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_length 41 is more than the 40 positions"):
        load_pretrained(tmp_path).generate(torch.full((1, 5), 4), max_length=41)
