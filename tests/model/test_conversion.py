"""RoBERTa -> Longformer and BART -> LED: the same model as long as the window covers the text."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_peers
from haloformer.model.conversion import convert_folder, repeat_positions
from haloformer.model.convert import load_pretrained


def roberta(cls="RobertaForMaskedLM"):
    torch.manual_seed(0)
    return hf_peers.scrambled(
        getattr(transformers, cls)(transformers.RobertaConfig(**hf_peers.ROBERTA))
    )


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(**hf_peers.BART)
    return hf_peers.scrambled(transformers.BartForConditionalGeneration(config))


@pytest.mark.parametrize("global_everywhere", [False, True], ids=["window", "all_global"])
def test_longformer_says_what_roberta_said(global_everywhere, tmp_path):
    peer = roberta().eval()
    peer.save_pretrained(tmp_path / "short")
    convert_folder(tmp_path / "short", tmp_path / "long", 100, 64)
    ids, mask, _ = hf_peers.batch([30, 21], [])
    chosen = mask if global_everywhere else None
    ours = load_pretrained(tmp_path / "long")
    again = transformers.LongformerForMaskedLM.from_pretrained(tmp_path / "long").eval()
    with torch.no_grad():
        expected = peer(ids, mask).logits[mask.bool()]
        for model in (ours, again):
            found = model(ids, mask, chosen).logits[mask.bool()]
            assert hf_peers.relative_error(found, expected) < 1e-5


def test_longformer_reads_longer_texts_at_repeated_positions(tmp_path):
    peer = roberta()
    peer.save_pretrained(tmp_path / "short")
    convert_folder(tmp_path / "short", tmp_path / "long", 100, 8)
    ours = load_pretrained(tmp_path / "long")
    table = ours.model.encoder.embeddings.position_embeddings.weight
    learned = peer.roberta.embeddings.position_embeddings.weight
    assert table.shape == (102, 24)
    assert torch.equal(table[:34], learned)
    assert torch.equal(table[34:66], learned[2:])
    assert torch.equal(table[98:], learned[2:6])
    assert ours(hf_peers.batch([100], [[]])[0]).logits.isfinite().all()


def test_the_pooler_of_a_published_roberta_is_passed_over(tmp_path):
    peer = roberta().eval()
    peer.save_pretrained(tmp_path / "short")
    path = tmp_path / "short" / "model.safetensors"
    pooler = {"weight": torch.ones(24, 24), "bias": torch.ones(24)}
    weights = load_file(path) | {f"roberta.pooler.dense.{x}": y for x, y in pooler.items()}
    save_file(weights, path, metadata={"format": "pt"})
    convert_folder(tmp_path / "short", tmp_path / "long", 64, 64)
    ids, mask, _ = hf_peers.batch([30, 21], [])
    with torch.no_grad():
        found = load_pretrained(tmp_path / "long")(ids, mask).logits[mask.bool()]
        assert hf_peers.relative_error(found, peer(ids, mask).logits[mask.bool()]) < 1e-5


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering", "Model"])
def test_heads_come_along(head, tmp_path):
    peer = roberta(f"Roberta{head}").eval()
    peer.save_pretrained(tmp_path / "short")
    convert_folder(tmp_path / "short", tmp_path / "long", 64, 64)
    ids, mask, chosen = hf_peers.batch([30, 21], [[], []])
    with torch.no_grad():
        found = load_pretrained(tmp_path / "long")(ids, mask, chosen)
        expected = peer(ids, mask)
    name = {"ForQuestionAnswering": "start_logits", "Model": "pooler_output"}.get(head, "logits")
    real = mask.bool() if name == "start_logits" else slice(None)
    error = hf_peers.relative_error(getattr(found, name)[real], getattr(expected, name)[real])
    assert error < 1e-5


@pytest.mark.parametrize("global_everywhere", [False, True], ids=["window", "all_global"])
def test_led_says_what_bart_said(global_everywhere, tmp_path):
    peer = bart().eval()
    peer.save_pretrained(tmp_path / "short")
    convert_folder(tmp_path / "short", tmp_path / "long", 16 * 32, 64)
    ids, mask, _ = hf_peers.batch([30, 21], [])
    labels = hf_peers.batch([9, 9], [], seed=3)[0]
    chosen = mask if global_everywhere else None
    ours = load_pretrained(tmp_path / "long")
    again = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path / "long").eval()
    with torch.no_grad():
        expected = peer(ids, mask, labels=labels)
        for model in (ours, again):
            found = model(
                input_ids=ids, attention_mask=mask, global_attention_mask=chosen, labels=labels
            )
            assert hf_peers.relative_error(found.logits, expected.logits) < 1e-5
            assert abs(found.loss - expected.loss) < 1e-5
    table = ours.model.encoder.embeddings.positions.weight
    learned = peer.model.encoder.embed_positions.weight[2:]
    assert torch.equal(table, learned.repeat(16, 1))


def test_a_bart_as_published_without_its_head_becomes_the_same_led(tmp_path):
    peer = bart()
    for name, model in (("whole", peer), ("bare", peer.model)):
        model.save_pretrained(tmp_path / name)
        if name == "bare":
            path = tmp_path / name / "model.safetensors"
            versions = {f"{half}.version": torch.tensor([3.0]) for half in ("encoder", "decoder")}
            save_file(load_file(path) | versions, path, metadata={"format": "pt"})
        convert_folder(tmp_path / name, tmp_path / f"led_{name}", 64, 8)
    whole, bare = (load_pretrained(tmp_path / f"led_{x}").state_dict() for x in ("whole", "bare"))
    assert whole.keys() == bare.keys()
    # The constant per token is part of the head, and scrambled here.
    assert all(torch.equal(whole[x], bare[x]) for x in whole if x != "model.final_logits_bias")


def test_tokenizer_files_come_along(tmp_path):
    roberta().save_pretrained(tmp_path / "short")
    (tmp_path / "short" / "vocab.json").write_text('{"a": 0}')
    convert_folder(tmp_path / "short", tmp_path / "long", 64, 8)
    assert (tmp_path / "long" / "vocab.json").read_text() == '{"a": 0}'


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    roberta().save_pretrained(tmp_path / "short")
    for positions, window, message in ((16, 8, "16 is less than the 32"), (64, 7, "even number")):
        with pytest.raises(ValueError, match=message):
            convert_folder(tmp_path / "short", tmp_path / "long", positions, window)
    transformers.BertModel(transformers.BertConfig(**hf_peers.ROBERTA)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(ValueError, match="model_type is 'bert'; only roberta and bart"):
        convert_folder(tmp_path / "bert", tmp_path / "long", 64, 8)
    assert not (tmp_path / "long").exists()


@pytest.mark.parametrize(
    ("peer", "lost"),
    [
        (roberta, "embeddings.word_embeddings.weight"),
        (bart, "encoder.embed_positions.weight"),
        (bart, "shared.weight"),
    ],
)
def test_a_folder_that_lacks_a_table_is_refused(peer, lost, tmp_path):
    peer().save_pretrained(tmp_path / "short")
    path = tmp_path / "short" / "model.safetensors"
    kept = {name: x for name, x in load_file(path).items() if not name.endswith(lost)}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"nothing for \w+\.{lost}; is the folder whole"):
        convert_folder(tmp_path / "short", tmp_path / "long", 64, 8)


def test_repeated_positions():
    table = torch.arange(5)[:, None]  # 2 reserved, 3 learned
    assert repeat_positions(table, 2, 7, 2).flatten().tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 2]
    assert repeat_positions(table, 2, 6, 0).flatten().tolist() == [2, 3, 4, 2, 3, 4]
