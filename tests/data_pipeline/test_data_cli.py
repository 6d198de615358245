from __future__ import annotations

from haloformer.launcher.cli import main


def test_every_data_set_is_checked_and_every_damaged_one_is_named(
    make_dataset, tmp_path, capsys
) -> None:
    train, held_out = make_dataset([120, 80, 150]), make_dataset([60], name="eval")
    assert main(["data", "verify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{train}: ") and "3 documents, 350 tokens" in lines[0]
    assert lines[1].startswith(f"{held_out}: 1 shards")

    for tar in (min(train.glob("*.tar")), min(held_out.glob("*.tar"))):
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert main(["data", "verify", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(str(f) in line for f, line in zip((train, held_out), errors, strict=True))
    assert all("wrong sha256" in line and "prepare the data again" in line for line in errors)


def test_a_folder_without_a_data_set_is_refused_with_a_remedy(tmp_path, capsys) -> None:
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert "haloformer prepare" in capsys.readouterr().err
