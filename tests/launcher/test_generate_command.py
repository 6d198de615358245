"""`haloformer generate` writes what transformers would, document for document, as it goes."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import hf_peers
from haloformer.data_pipeline.tokenizer_json import write_for_transformers
from haloformer.data_pipeline.tokenizers import ByteTokenizer
from haloformer.launcher import generate_command
from haloformer.launcher.cli import main
from haloformer.launcher.summarizer import open_summarizer
from haloformer.model.generate import SearchSettings
from launcher_runs import LIMIT_S

SIZES = {**hf_peers.LED, "vocab_size": ByteTokenizer.vocab_size}
DOCUMENTS = ["Long reports make short summaries.", "", "Zwei Größen: n und w.", "a b a b a b a b"]
BEAMS = {"num_beams": 4, "min_length": 6, "length_penalty": 1.5, "no_repeat_ngram_size": 2}


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("led")
    torch.manual_seed(0)
    peer = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**SIZES))
    hf_peers.scrambled(peer).save_pretrained(folder)
    write_for_transformers(ByteTokenizer(), folder, 64)
    return folder


def expected(folder: Path, document: str, num_globals: int = 1, **options) -> str:
    """What transformers writes, <s> global or nothing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LEDForConditionalGeneration.from_pretrained(folder).eval()
    ids = tokenizer(document, return_tensors="pt")["input_ids"]
    chosen = torch.zeros_like(ids)
    chosen[:, :num_globals] = 1
    found = model.generate(ids, global_attention_mask=chosen, do_sample=False, **options)
    return tokenizer.decode(found[0], skip_special_tokens=True)


@pytest.mark.parametrize("batch", ["1", "3"])
def test_greedy_and_beams_write_what_transformers_writes(batch, led, tmp_path):
    asked = tmp_path / "asked.txt"
    asked.write_text("\n".join(DOCUMENTS) + "\n")
    words = [
        *("--max-length", "20", "--beams", "4", "--min-length", "6", "--length-penalty", "1.5"),
        *("--no-repeat-ngram-size", "2"),
    ]
    for options, call in ((["--max-length", "20"], {}), (words, BEAMS)):
        output = tmp_path / f"answers-{len(options)}.jsonl"
        command = ["generate", str(led), "--input", str(asked), "--output", str(output)]
        assert main([*command, "--batch", batch, *options]) == 0
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [answer["line"] for answer in found] == [1, 2, 3, 4]
        for answer, document in zip(found, DOCUMENTS, strict=True):
            wanted = expected(led, document, max_length=20, **call) if document else ""
            assert answer["output"] == wanted
        assert len({answer["output"] for answer in found}) == 4


def test_a_model_without_global_tokens_gets_none(led):
    with_globals = open_summarizer(str(led), None, None, None)
    summarizer = dataclasses.replace(with_globals, has_globals=False)
    settings = SearchSettings(max_length=20, no_repeat_ngram_size=2)
    call = {"max_length": 20, "no_repeat_ngram_size": 2}
    ids = [summarizer.encode(DOCUMENTS[0])]
    assert summarizer.answer(ids, settings) == [expected(led, DOCUMENTS[0], 0, **call)]
    assert summarizer.answer(ids, settings) != with_globals.answer(ids, settings)


def test_text_has_a_line_per_line_and_jsonl_a_line_per_object(led, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    lines = [json.dumps({"source": "one", "target": "x"}), "", json.dumps({"text": "two"})]
    asked.write_text("\n".join(lines))
    assert main(["generate", str(led), "--input", str(asked), "--json"]) == 0
    printed = capsys.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 3]
    assert "2/2 documents" in printed.err
    (tmp_path / "asked.txt").write_text("one\n\ntwo\n")
    assert main(["generate", str(led), "--input", str(tmp_path / "asked.txt")]) == 0
    first, second, third = capsys.readouterr().out.split("\n")[:3]
    assert (first, second) == (" ".join(answers[0]["output"].split()), "")
    assert third == " ".join(answers[1]["output"].split())


def test_a_source_that_is_too_long_is_found_before_anything_is_written(led, tmp_path, capsys):
    asked, output = tmp_path / "asked.txt", tmp_path / "answers.txt"
    asked.write_text("short\n" + "x" * 63 + "\n")
    command = ["generate", str(led), "--input", str(asked), "--output", str(output)]
    assert main(command) == 2
    assert f"{asked}:2: the document has 65 tokens, the model reads 64" in capsys.readouterr().err
    assert not output.exists()
    assert main([*command, "--truncate"]) == 0
    cut = output.read_text().splitlines()[1]
    assert cut == " ".join(expected(led, "x" * 62, max_length=40).split())


def test_ctrl_c_keeps_what_is_done(led, tmp_path):
    asked, output = tmp_path / "asked.txt", tmp_path / "answers.jsonl"
    asked.write_text("a document of some length\n" * 20000)
    command = ["generate", str(led), "--input", str(asked), "--output", str(output)]
    with subprocess.Popen(
        [sys.executable, "-m", "haloformer.launcher.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not (output.exists() and output.stat().st_size):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)  # a poll interval; nothing depends on its length
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()  # if it is still there
    assert process.returncode == 130
    done = [json.loads(line)["line"] for line in output.read_text().splitlines()]
    assert done == list(range(1, len(done) + 1)) and 0 < len(done) < 20000
    assert f"stopped after {len(done)} of 20000 documents; they are in {output}" in said


def test_ctrl_c_between_two_answers_of_a_batch_counts_what_is_in_the_file(
    led, tmp_path, capsys, monkeypatch
):
    asked, output = tmp_path / "asked.txt", tmp_path / "answers.jsonl"
    asked.write_text("one\ntwo\nthree\n")
    line = generate_command._line

    def interrupted(asked, text, as_json):
        if asked.line == 2:
            raise KeyboardInterrupt
        return line(asked, text, as_json)

    monkeypatch.setattr(generate_command, "_line", interrupted)
    words = ["--input", str(asked), "--output", str(output), "--batch", "3", "--max-length", "4"]
    assert main(["generate", str(led), *words]) == 130
    assert len(output.read_text().splitlines()) == 1
    assert f"stopped after 1 of 3 documents; they are in {output}" in capsys.readouterr().err


def test_wrong_input_is_one_line_and_exit_2(led, tmp_path, capsys):
    asked, there = tmp_path / "asked.txt", tmp_path / "there.txt"
    asked.write_text("one\n")
    there.write_text("mine")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"title": "two"}\n')
    mlm = tmp_path / "mlm"
    sizes = {"vocab_size": 261, "hidden_size": 8, "num_hidden_layers": 1, "attention_window": 4}
    config = transformers.LongformerConfig(**sizes, num_attention_heads=2, intermediate_size=8)
    transformers.LongformerForMaskedLM(config).save_pretrained(mlm)
    write_for_transformers(ByteTokenizer(), mlm, 64)
    capsys.readouterr()
    for model, source, options, message in (
        (led, asked, ["--beams", "0"], "num_beams 0 is less than 1"),
        (led, asked, ["--batch", "0"], "--batch is 0"),
        (led, asked, ["--max-length", "41"], "--max-length 41 is more than the model's 40"),
        (led, asked, ["--min-length", "50"], "min_length 50 is more than max_length 40"),
        (led, asked, ["--output", str(there)], "is there already"),
        (led, tmp_path / "nothing.txt", [], "no such file"),
        (led, broken, [], f"{broken}:2: no text under 'source' or 'text'"),
        (mlm, asked, [], "holds a MaskedLM, which writes no text; name an LED"),
        (tmp_path, asked, [], "no config.json; name a run or the folder of a model"),
    ):
        assert main(["generate", str(model), "--input", str(source), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert there.read_text() == "mine"


def test_a_tokenizer_of_another_model_is_refused(led, tmp_path, capsys):
    asked = tmp_path / "asked.txt"
    asked.write_text("one\n")
    small = transformers.LEDConfig(**SIZES | {"vocab_size": 100})
    transformers.LEDForConditionalGeneration(small).save_pretrained(tmp_path / "small")
    command = ["generate", str(tmp_path / "small"), "--input", str(asked)]
    assert main(command) == 2
    assert "no tokenizer.json; copy the tokenizer" in capsys.readouterr().err
    write_for_transformers(ByteTokenizer(), tmp_path / "small", 64)
    assert main(command) == 2
    assert "has 261 tokens, the model 100; it is another's" in capsys.readouterr().err
