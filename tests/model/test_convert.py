"""transformers' Longformer folders: loaded, equal in value and gradient, written back."""

import json
import shlex

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_peers
from haloformer.model.convert import load_pretrained, save_pretrained

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

# name: (attention_window, lengths, width, global positions per row)
CASES = {
    "several_globals": ([4, 8], [32, 32], None, [[0, 5, 31], [0, 1, 2]]),
    "counts_differ": ([6, 6], [30, 24, 30], None, [[0], [3, 9, 23], []]),
    "padding_not_of_window": ([4, 12], [29, 17], 31, [[0, 28], [16]]),
    "odd_length": ([8, 4], [37, 23], None, [[0], [22, 0]]),
    "no_globals": ([4, 4], [16, 9], None, [[], []]),
    "window_wider_than_sequence": ([64, 32], [13, 11], None, [[0], [4]]),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def peer_config(window, **more):
    fixed = {"attention_window": window, "initializer_range": 0.2, "layer_norm_eps": 1e-5}
    return transformers.LongformerConfig(**{**hf_peers.LONGFORMER, **fixed, **more})


def labels_for(ids, mask, seed=1):
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & mask.bool()
    return torch.where(chosen, ids, -100)


def compare(peer, folder, dtype, call, outputs=("loss", "logits")):
    theirs, ours = hf_peers.both(hf_peers.scrambled(peer), folder, dtype)
    with hf_peers.softmax_in_own_precision():
        reference = theirs(**call)
        reference.loss.backward()
    found = ours(**call)
    found.loss.backward()
    for name in outputs:
        error = hf_peers.relative_error(getattr(found, name), getattr(reference, name))
        assert error <= TOLERANCE[dtype], (name, error)
    hf_peers.assert_same_gradients(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_mlm_equals_transformers(case, dtype, tmp_path):
    window, lengths, width, places = CASES[case]
    ids, mask, chosen = hf_peers.batch(lengths, places, width)
    call = {
        "input_ids": ids,
        "attention_mask": mask,
        "global_attention_mask": chosen,
        "labels": labels_for(ids, mask),
    }
    peer = transformers.LongformerForMaskedLM(peer_config(window))
    compare(peer, tmp_path / "peer", dtype, call)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("has_globals", [True, False], ids=["globals", "default_global"])
def test_classification_equals_transformers(num_labels, has_globals, tmp_path):
    ids, mask, chosen = hf_peers.batch([19, 14, 8], [[0, 7], [0], [0, 1, 2]])
    labels = torch.tensor([0.5, -1.0, 2.0]) if num_labels == 1 else torch.tensor([2, 0, 1])
    call = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if has_globals:
        call["global_attention_mask"] = chosen
    peer = transformers.LongformerForSequenceClassification(
        peer_config([4, 6], num_labels=num_labels)
    )
    call["labels"] = labels.double() if num_labels == 1 else labels
    compare(peer, tmp_path / "peer", torch.float64, call)


@pytest.mark.parametrize("has_globals", [True, False], ids=["globals", "question_global"])
def test_question_answering_equals_transformers(has_globals, tmp_path):
    ids, mask, chosen = hf_peers.batch([23, 17], [[0, 1, 2, 3], [0, 1]])
    for row, places in enumerate([(4, 5, 22), (3, 4, 16)]):  # <s> question </s></s> context </s>
        ids[row, list(places)] = 2
    call = {
        "input_ids": ids,
        "attention_mask": mask,
        "start_positions": torch.tensor([7, 99]),  # the second answer was cut off
        "end_positions": torch.tensor([9, 12]),
    }
    if has_globals:
        call["global_attention_mask"] = chosen
    peer = transformers.LongformerForQuestionAnswering(peer_config([4, 6]))
    compare(peer, tmp_path / "peer", torch.float64, call, ("loss", "start_logits", "end_logits"))


def test_bare_encoder_with_pooler_equals_transformers(tmp_path):
    ids, mask, chosen = hf_peers.batch([19, 14], [[0, 7], [3]])
    peer = hf_peers.scrambled(transformers.LongformerModel(peer_config([4, 6])))
    theirs, ours = hf_peers.both(peer, tmp_path / "peer", torch.float32)
    reference = theirs(ids, mask, chosen)
    found = ours(ids, mask, chosen)
    assert hf_peers.relative_error(found.last_hidden_state, reference.last_hidden_state) < 1e-5
    assert hf_peers.relative_error(found.pooler_output, reference.pooler_output) < 1e-5
    with pytest.raises(ValueError, match="no head"):
        ours(ids, mask, chosen, labels=ids)


def test_transformers_rounds_attention_weights_to_float32_and_we_do_not(tmp_path):
    """The one place where a float64 comparison needs a changed transformers: see the helper."""
    ids, mask, chosen = hf_peers.batch([20], [[0]])
    peer = hf_peers.scrambled(transformers.LongformerForMaskedLM(peer_config(4)))
    theirs, ours = hf_peers.both(peer, tmp_path / "peer", torch.float64)
    with torch.no_grad():
        found = ours(ids, mask, chosen).logits
        rounded = theirs(ids, mask, chosen).logits
        with hf_peers.softmax_in_own_precision():
            exact = theirs(ids, mask, chosen).logits
    assert hf_peers.relative_error(found, exact) < 1e-12
    assert 1e-9 < hf_peers.relative_error(found, rounded) < 1e-5


def test_window_is_two_sided(tmp_path):
    """With window 4 a token sees two to either side: a change three places away stays unseen."""
    peer = hf_peers.scrambled(
        transformers.LongformerForMaskedLM(peer_config(4, num_hidden_layers=1))
    )
    _, ours = hf_peers.both(peer, tmp_path / "peer", torch.float64)
    ids = hf_peers.batch([20], [[]])[0]
    before = ours(ids).logits
    ids[0, 10] = (ids[0, 10] - 3 + 1) % (hf_peers.VOCAB - 3) + 3
    changed = (ours(ids).logits != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [8, 9, 10, 11, 12]


def test_one_sided_config_of_the_original_code_is_refused(tmp_path):
    transformers.LongformerForMaskedLM(peer_config(4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "attention_mode": "sliding_chunks"}))
    with pytest.raises(ValueError, match=r"one side.*double attention_window"):
        load_pretrained(tmp_path)


def test_the_published_config_which_has_a_mode_too_is_not_refused(tmp_path):
    transformers.LongformerForMaskedLM(peer_config([4, 8])).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    left_over = {"attention_mode": "longformer", "ignore_attention_mask": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **left_over}))
    assert load_pretrained(tmp_path).model.encoder.layers[1].attention.spec.left == (4, 4, 4)


def test_export_gives_transformers_the_same_model(tmp_path):
    peer = hf_peers.scrambled(transformers.LongformerForMaskedLM(peer_config([4, 6])))
    _, ours = hf_peers.both(peer, tmp_path / "peer", torch.float32)
    save_pretrained(ours, tmp_path / "out")
    original = load_file(tmp_path / "peer" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)
    again = transformers.LongformerForMaskedLM.from_pretrained(tmp_path / "out")
    ids, mask, chosen = hf_peers.batch([20], [[0]])
    with torch.no_grad():
        found, reference = again(ids, mask, chosen).logits, peer.eval()(ids, mask, chosen).logits
    assert hf_peers.relative_error(found, reference) < 1e-6
    with pytest.raises(ValueError, match="there already"):
        save_pretrained(ours, tmp_path / "out")


def test_weights_in_several_files_are_read(tmp_path):
    peer = transformers.LongformerForMaskedLM(peer_config(4))
    peer.save_pretrained(tmp_path, max_shard_size="20kB")
    assert not (tmp_path / "model.safetensors").exists()
    ids, mask, chosen = hf_peers.batch([20], [[0]])
    with torch.no_grad():
        found = load_pretrained(tmp_path)(ids, mask, chosen).logits
        assert hf_peers.relative_error(found, peer.eval()(ids, mask, chosen).logits) < 1e-5
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    with pytest.raises(ValueError, match="not there"):
        load_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (("{", "not readable as JSON"), ('{"weight_map": [3]}', "names no files")):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"{index.name}: {message}"):
            load_pretrained(tmp_path)


def test_pickle_is_refused_with_a_command_that_converts_it(tmp_path):
    peer = transformers.LongformerForMaskedLM(peer_config(4))
    folder = tmp_path / "old"
    peer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(peer.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle") as refusal:
        load_pretrained(folder)
    *interpreter, code = shlex.split(str(refusal.value).split("trust it: ")[1])
    assert interpreter == ["python", "-c"]
    exec(code)  # here, because another process would take seconds to import transformers
    ids = hf_peers.batch([20], [[]])[0]
    with torch.no_grad():
        found = load_pretrained(f"{folder}-safetensors")(ids).logits
        assert hf_peers.relative_error(found, peer.eval()(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"architectures": ["AutoModel; import os"]}, "AutoModel"),
        ({"model_type": "longformer"}, "AutoModelForMaskedLM"),
    ],
)
def test_only_a_class_gets_from_a_folder_into_the_command(raw, named, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"as t; t\.{named}\.from_pretrained\("):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"architectures": ["LongformerForTokenClassification"]}, "cannot load"),
        ({"architectures": None}, "no architectures"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"num_hidden_layers": 3, "attention_window": [4, 4, 4]}, "lacks"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"vocab_size": 7}, r"word_embeddings.weight has shape \(53, 24\), by config.json .*7, 24"),
        ({"architectures": ["LongformerForSequenceClassification"]}, "lacks classifier.dense.bias"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_other_models_are_refused_in_one_line(change, message, tmp_path):
    transformers.LongformerForMaskedLM(peer_config(4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as refusal:
        load_pretrained(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_damaged_file_and_missing_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_pretrained(tmp_path / "nowhere")
    transformers.LongformerForMaskedLM(peer_config(4)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load_pretrained(tmp_path)


def test_too_long_a_sequence_is_refused(tmp_path):
    transformers.LongformerForMaskedLM(peer_config(4)).save_pretrained(tmp_path)
    ids = hf_peers.batch([69], [[]])[0]
    with pytest.raises(ValueError, match="position 70, the model has 70; shorten"):
        load_pretrained(tmp_path)(ids)


def test_dropout_follows_torch_seed_and_train_mode(tmp_path):
    config = peer_config(4, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    transformers.LongformerForMaskedLM(config).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    ids = hf_peers.batch([20], [[]])[0]
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(ours(ids).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
