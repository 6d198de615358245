"""`haloformer convert` writes a whole folder that transformers loads, or nothing."""

import json

import pytest
import torch
import transformers

import hf_peers
from haloformer.launcher.cli import main
from haloformer.launcher.new_folder import new_folder


def short_model(folder, kind):
    torch.manual_seed(0)
    if kind == "roberta":
        peer = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**hf_peers.ROBERTA))
    else:
        peer = transformers.BartForConditionalGeneration(transformers.BartConfig(**hf_peers.BART))
    hf_peers.scrambled(peer).eval().save_pretrained(folder)
    settings = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return peer


@pytest.mark.parametrize(
    ("kind", "cls", "positions"),
    [
        ("roberta", transformers.LongformerForMaskedLM, 4096),
        ("bart", transformers.LEDForConditionalGeneration, 16384),
    ],
)
def test_the_long_model_says_what_the_short_one_said(kind, cls, positions, tmp_path, capsys):
    peer = short_model(tmp_path / "short", kind)
    assert main(["convert", str(tmp_path / "short"), str(tmp_path / "out" / "long")]) == 0
    output = capsys.readouterr().out
    assert "reading" in output and f"{positions} positions" in output
    long = cls.from_pretrained(tmp_path / "out" / "long").eval()
    assert set(long.config.attention_window) == {512 if kind == "roberta" else 1024}
    ids, mask, _ = hf_peers.batch([30], [])
    with torch.no_grad():
        expected, found = peer(ids, mask).logits, long(ids, mask).logits
    assert hf_peers.relative_error(found, expected) < 1e-5
    kept = json.loads((tmp_path / "out" / "long" / "tokenizer_config.json").read_text())
    assert kept == {"tokenizer_class": "RobertaTokenizer", "model_max_length": positions}
    assert (tmp_path / "out" / "long" / "merges.txt").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["long"]


def test_numbers_that_are_given_count(tmp_path):
    short_model(tmp_path / "short", "roberta")
    (tmp_path / "long").mkdir()  # an empty folder is as good as none
    numbers = ["--max-positions", "100", "--attention-window", "8"]
    assert main(["convert", str(tmp_path / "short"), str(tmp_path / "long"), *numbers]) == 0
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    assert config["max_position_embeddings"] == 102 and config["attention_window"] == [8, 8]


def test_wrong_input_is_one_line_exit_2_and_nothing_is_written(tmp_path, capsys):
    short_model(tmp_path / "short", "roberta")
    short_model(tmp_path / "pickled", "roberta")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    sizes = {key: n for key, n in hf_peers.ROBERTA.items() if key != "type_vocab_size"}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    for source, target, options, message in (
        ("short", "full", [], "is there already and not empty; name a new folder"),
        ("short", "full/notes.txt", [], "is there already and no folder"),
        ("nowhere", "long", [], "no config.json"),
        ("pickled", "long", [], "RobertaForMaskedLM.from_pretrained"),
        ("bert", "long", [], "model_type is 'bert'; only roberta and bart"),
        ("short", "long", ["--attention-window", "7"], "attention window 7 is not an even number"),
        ("short", "long", ["--max-positions", "20"], "20 is less than the 32"),
    ):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_was_not_finished_is_not_there(tmp_path):
    def stopped_half_way():
        with new_folder(tmp_path / "long") as scratch:
            (scratch / "config.json").write_text("{}")
            assert not (tmp_path / "long").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--help"])
    assert ended.value.code == 0
    assert "example: haloformer convert roberta-base longformer" in capsys.readouterr().out
