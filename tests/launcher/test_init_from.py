"""Runs that start from a transformers folder: the same model on any ranks, or a clear refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import hf_peers
from dist import run_ranks
from haloformer.configs.load import parse_config
from haloformer.data_pipeline.index import load_index
from haloformer.data_pipeline.stream import EvalStream
from haloformer.data_pipeline.tokenizer_json import tokenizer_sha256_of, write_for_transformers
from haloformer.data_pipeline.tokenizers import ByteTokenizer, train_bpe
from haloformer.launcher.cli import main
from haloformer.launcher.init_from import check_start
from launcher_runs import TINY, haloformer, held_out, newest_run, write_project
from start_ranks import walk
from task_layouts import LED, write_data

transformers = pytest.importorskip("transformers")

# The folder can read more than the recipe needs.
SIZES = {
    "vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 162, "attention_window": [8, 8],
    "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "sep_token_id": 2,
}  # fmt: skip
LAYOUTS = {1: [(1, 1, 1, 1)], 2: [(1, 1, 2, 1), (1, 2, 1, 3), (2, 1, 1, 0)]}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**SIZES)
    peer = hf_peers.scrambled(transformers.LongformerForMaskedLM(config))
    peer.save_pretrained(folder / "mlm")
    classifier = transformers.LongformerForSequenceClassification(config)
    classifier.save_pretrained(folder / "classifier")
    transformers.LongformerModel(config).save_pretrained(folder / "bare")
    return folder


def recipe(project: Path, start: str, **model) -> dict:
    data = {part: str(project / "data" / part) for part in ("train", "eval")}
    sizes = {**TINY["model"], "dilation": 1, "attention_window": 8, **model}
    return {**TINY, "init_from": str(project / start), "model": sizes,
            "data": {**TINY["data"], **data}}  # fmt: skip


def check(raw: dict) -> None:
    config = parse_config(raw, "recipe")
    check_start(config, load_index(config.data.corpora[0].path, config.data.cache))


def peers_loss(raw: dict) -> float:
    """transformers' own mean loss over the held-out batches."""
    config = parse_config(raw, "recipe")
    peer = transformers.LongformerForMaskedLM.from_pretrained(config.init_from).eval()
    stream = EvalStream(
        config.data.eval, config.data, global_batch=4, data_rank=0, data_world=1, num_batches=2
    )
    total, count = 0.0, 0
    for batch in stream:
        chosen = torch.zeros(batch.input_ids.shape, dtype=torch.int64)
        for row, places in enumerate(batch.global_positions):
            chosen[row, places[batch.global_mask[row]]] = 1
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask).long()
        labels = torch.from_numpy(batch.labels)
        with torch.no_grad():
            loss = peer(ids, mask, chosen, labels=labels).loss
        num = int((labels != -100).sum())
        total, count = total + float(loss) * num, count + num
    return total / count


@pytest.fixture(scope="module")
def started(project: Path):
    raw, seen = recipe(project, "mlm"), {}
    check(raw)
    for world, layouts in LAYOUTS.items():
        ranks = run_ranks(world, walk, raw, layouts, timeout=300.0)
        assert all(rank == ranks[0] for rank in ranks)
        seen |= ranks[0]
    return raw, seen


def test_the_first_held_out_loss_is_that_of_transformers_on_any_layout(started) -> None:
    raw, seen = started
    expected = peers_loss(raw)
    for layout, (said, loss, _) in seen.items():
        assert loss == pytest.approx(expected, rel=1e-5), layout
        assert said == f"weights of {raw['init_from']} (LongformerForMaskedLM)"


def test_training_goes_on_alike_on_any_layout(started) -> None:
    _, seen = started
    reference, *others = (history for _, _, history in seen.values())
    assert len({loss for loss, _ in reference}) == 3
    for history in others:
        for want, have in zip(reference, history, strict=True):
            assert have == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("bare", "(LongformerModel); new, at random: head; not used: pooler.dense"),
        ("classifier", "(LongformerForSequenceClassification); new, at random: head; "
         "not used: classifier.dense, classifier.out_proj"),
    ],
)  # fmt: skip
def test_the_encoder_of_any_longformer_loads_and_a_fresh_head_is_said(
    project: Path, start: str, said: str
) -> None:
    raw = recipe(project, start)
    check(raw)
    ((found, _, _),) = run_ranks(1, walk, raw, LAYOUTS[1])[0].values()
    assert found == f"weights of {raw['init_from']} {said}"


def test_every_number_that_differs_is_named(project: Path) -> None:
    raw = recipe(project, "mlm", hidden_size=48, num_layers=3, max_positions=200)
    with pytest.raises(ValueError) as caught:
        check(raw)
    for part in (
        f"init_from {project / 'mlm'}: ",
        "model.hidden_size is 48, the folder's 32",
        "model.num_layers is 3, the folder's 2",
        "model.max_positions is 200, the folder has 160; convert the short model to more",
    ):
        assert part in str(caught.value)


def edited(project: Path, tmp_path: Path, start: str = "mlm", **changes) -> str:
    """A copy of a folder whose config.json says something else."""
    shutil.copytree(project / start, tmp_path / "edited")
    path = tmp_path / "edited" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(tmp_path / "edited")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 300}, "its vocabulary has 300 tokens, the data's tokenizer 261"),
        ({"eos_token_id": 3}, "its eos_token_id is 3, the data's tokenizer has 2"),
        ({"architectures": ["RobertaForMaskedLM"]}, "it holds a RobertaForMaskedLM, and a longfor"),
        ({"architectures": None}, "it holds a model without a name, and a longformer_mlm starts"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', but our layers have 'gelu' only"),
        (
            {"num_hidden_layers": 3},
            "edited: config.json: attention_window has 2 entries for 3 layers",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(project, tmp_path, changes, named) -> None:
    raw = recipe(project, "mlm") | {"init_from": edited(project, tmp_path, **changes)}
    with pytest.raises(ValueError, match=named):
        check(raw)


def test_a_folder_that_is_not_there_or_not_whole_is_refused(project, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no such folder .seen from"):
        check(recipe(project, "nowhere"))
    raw = recipe(project, "mlm") | {"init_from": edited(project, tmp_path)}
    path = tmp_path / "edited" / "model.safetensors"
    weights = load_file(path)
    del weights["longformer.encoder.layer.1.output.dense.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks longformer.encoder.layer.1.output.dense.bias; is"):
        check(raw)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        check(raw)


def test_another_tokenizer_than_the_datas_is_refused_in_each_form(project, tmp_path) -> None:
    raw = recipe(project, "mlm") | {"init_from": edited(project, tmp_path)}
    folder = tmp_path / "edited"
    write_for_transformers(ByteTokenizer(), folder, 128)
    check(raw)
    (folder / "tokenizer_kind.json").unlink()
    check(raw)  # what is left is BPE that merges nothing
    other = train_bpe(["abc abd"], 261)
    other.save(folder)
    with pytest.raises(ValueError, match=r"its tokenizer .* is not that of the data"):
        check(raw)


def test_one_tokenizer_has_one_hash_in_each_of_its_forms(tmp_path) -> None:
    tokenizer = train_bpe(["some words, some more words"], 270)
    write_for_transformers(tokenizer, tmp_path, 128)
    assert tokenizer_sha256_of(tmp_path) == tokenizer.sha256
    (tmp_path / "tokenizer_kind.json").unlink()
    assert tokenizer_sha256_of(tmp_path) == tokenizer.sha256
    (tmp_path / "vocab.json").unlink()
    assert tokenizer_sha256_of(tmp_path) == tokenizer.sha256  # of tokenizer.json
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizer_sha256_of(tmp_path) is None


def test_an_led_that_was_exported_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    """Trained, exported, and the start of another run on 2 tensor ranks, by the commands."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = {"train": "led", "eval": "led", "seq_len": 47, "target_len": 15}
    parts = {"model": LED, "data": data, "parallel": {"context": 1}, "steps": 3}
    Path("led.yaml").write_text(yaml.safe_dump({**TINY, **parts}))
    done = haloformer(tmp_path, ["train", "led.yaml", "--ranks", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
    trained = held_out(newest_run(tmp_path))[3]
    assert main(["export", "latest", "exported"]) == 0
    words = ["init_from=exported", "parallel.tensor=2", "name=second"]
    done = haloformer(tmp_path, ["train", "led.yaml", "--ranks", "2", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights of exported (LEDForConditionalGeneration)" in done.stdout
    second = held_out(newest_run(tmp_path))
    assert second[0] == pytest.approx(trained, rel=1e-5) and second[3] < second[0]
    shutil.rmtree("exported")  # a run that goes on does not need it
    more = ["--ranks", "1", "init_from=exported", "name=second", "steps=4", "--resume", "latest"]
    done = haloformer(tmp_path, ["train", "led.yaml", *more])
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(held_out(newest_run(tmp_path))) == [0, 3, 4]


def test_an_led_with_a_constant_per_token_is_refused(tmp_path) -> None:
    write_data(tmp_path)
    sizes = {
        "vocab_size": 261, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 20, "max_encoder_position_embeddings": 48,
        "max_decoder_position_embeddings": 16, "attention_window": [4, 20],
    }  # fmt: skip
    peer = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**sizes))
    place = str(tmp_path / "led")
    data = {"train": place, "eval": place, "seq_len": 47, "target_len": 15}
    raw = {**TINY, "model": LED, "data": data, "init_from": str(tmp_path / "peer")}
    peer.save_pretrained(tmp_path / "peer")
    check(raw)
    peer.final_logits_bias[0, 7] = 0.5
    peer.save_pretrained(tmp_path / "peer")
    with pytest.raises(ValueError, match="final_logits_bias is not zero, which checkpoints"):
        check(raw)


def test_a_converted_roberta_is_a_start(project: Path, tmp_path, capsys) -> None:
    config = transformers.RobertaConfig(**{**SIZES, "max_position_embeddings": 34})
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "short")
    words = ["--max-positions", "128", "--attention-window", "8"]
    assert main(["convert", str(tmp_path / "short"), str(tmp_path / "long"), *words]) == 0
    raw = recipe(project, "mlm")
    check(raw | {"init_from": str(tmp_path / "long")})
    with pytest.raises(
        ValueError, match=r"RobertaForMaskedLM, .* make one of a RoBERTa with 'halo"
    ):
        check(raw | {"init_from": str(tmp_path / "short")})


def test_models_that_have_no_such_start_are_refused(project: Path) -> None:
    sizes = recipe(project, "mlm")["model"]
    char_lm = {key: sizes[key] for key in ("hidden_size", "num_layers", "num_heads", "ffn_size")}
    char_lm |= {"kind": "char_lm", "max_positions": 128, "attention_window": 8}
    with pytest.raises(ValueError, match="transformers has no char_lm to start from"):
        check(recipe(project, "mlm") | {"model": char_lm})
