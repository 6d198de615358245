"""What cannot be evaluated is named before any rank starts."""

import json
import re
from pathlib import Path

import pytest
import torch

from evaluation_ranks import MLM
from haloformer.configs.schema import ModelConfig
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.tokenizer_json import write_for_transformers
from haloformer.data_pipeline.tokenizers import ByteTokenizer, train_bpe
from haloformer.launcher.cli import main
from haloformer.launcher.evaluate_subject import open_subject
from haloformer.model.convert import plain_from_config, save_pretrained
from haloformer.model.hf_config import TokenIds


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A transformers Longformer for bytes, texts in bytes, and texts in other tokens."""
    torch.manual_seed(0)
    special = ByteTokenizer.specials
    tokens = TokenIds(bos=special.bos, pad=special.pad, eos=special.eos)
    model = plain_from_config(ModelConfig(**MLM), ByteTokenizer.vocab_size, tokens)
    save_pretrained(model, tmp_path / "hf")
    write_for_transformers(ByteTokenizer(), tmp_path / "hf", 48)
    texts = ["a text of words"] * 3
    for name, tokenizer in (("bytes", ByteTokenizer()), ("words", train_bpe(texts, 270))):
        (tmp_path / name).mkdir()
        with DatasetWriter(tmp_path / name, tokenizer, 1000) as writer:
            for text in texts:
                writer.add(text, tokenizer.encode(text), "text")
            writer.close()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_read_as_long_as_it_can_read(here):
    config = open_subject("hf", None, None, "bytes").config
    assert config.data.seq_len == 48 and config.model.attention_window == [4, 12]
    # A folder of an older tokenizer has no tokenizer.json; ours has what load_bpe reads.
    train_bpe(["a text of words"] * 3, 270).save(here / "hf")
    (here / "hf" / "tokenizer.json").unlink()
    edit(here / "hf" / "config.json", vocab_size=300)
    assert open_subject("hf", None, None, "words").folder == here / "hf"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "words"], "words: made with another tokenizer than hf has: .* is token"),
        (["--data", "bytes", "--step", "3"], "--step 3 is of a run, and hf is a folder"),
        (["--data", "nowhere"], "nowhere: holds no index.json"),
        (["--data", "bytes", "--beams", "2"], "--beams is not for this kind .* reads --limit"),
        (["--data", "bytes", "--json", "no/found.json"], "--json no/found.json: not a file in"),
        (["--data", "bytes", "--ranks", "0"], "--ranks 0 is less than 1"),
    ],
)
def test_the_command_names_what_it_cannot_use(here, options, named, capsys):
    assert main(["evaluate", "hf", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(named, error), error
    assert not (here / "runs").exists()


def test_a_folder_without_a_tokenizer_or_with_other_special_tokens_is_refused(here):
    edit(here / "hf" / "config.json", eos_token_id=3)
    with pytest.raises(ValueError, match="eos_token_id is 3, and for the data it is 2"):
        open_subject("hf", None, None, "bytes")
    edit(here / "hf" / "config.json", eos_token_id=2, architectures=["LongformerModel"])
    with pytest.raises(ValueError, match="holds LongformerModel; evaluate scores"):
        open_subject("hf", None, None, "bytes")
    edit(here / "hf" / "config.json", architectures=["LongformerForMaskedLM"])
    for name in ("tokenizer.json", "tokenizer_kind.json"):
        (here / "hf" / name).unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.json and no vocab.json"):
        open_subject("hf", None, None, "bytes")
    with pytest.raises(ValueError, match=r"bytes: no config.json; name a run"):
        open_subject("bytes", None, None, "bytes")
