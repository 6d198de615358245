"""`haloformer bench attention` checks before it measures, and says what it could not measure."""

import json

import pytest
import torch

from haloformer.kernels import chunks
from haloformer.launcher import bench, bench_command, bench_peers
from haloformer.launcher.bench_memory import peak_growth_mib
from haloformer.launcher.bench_parity import ParityError
from haloformer.launcher.cli import main

TINY = ["--window", "16", "--heads", "2", "--head-dim", "8", "--rounds", "1", "--threads", "1"]
NUMBERS = ("fwd_ms", "fwd_bwd_ms", "fwd_over_floor", "fwd_bwd_over_floor", "fwd_over_ours")


@pytest.fixture(autouse=True)
def threads():
    """The bench sets the threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_run_writes_numbers_a_table_and_a_picture(tmp_path, capsys):
    files = [tmp_path / "bench.json", tmp_path / "bench.png"]
    command = ["bench", "attention", "--n", "40,64", *TINY, "--peers", "transformers-maths"]
    assert main([*command, "--json", str(files[0]), "--png", str(files[1])]) == 0
    report = json.loads(files[0].read_text())
    assert report["parity"] == "ok" and report["versions"]["torch"] == torch.__version__
    assert report["device"] and "command" in report
    assert all(check["error"] <= 2e-5 for check in report["parity_checks"])
    assert [floor["n"] for floor in report["floor"]] == [40, 64]
    rows = {(row["contender"], row["n"]): row for row in report["results"]}
    assert set(rows) == {(c, n) for c in ("haloformer", "transformers-maths") for n in (40, 64)}
    # 40 is not a multiple of 16: the peer cannot, and the table says so.
    odd = rows.pop(("transformers-maths", 40))
    assert odd["fwd_ms"] is None and "multiple of 16" in odd["note"]
    for row in rows.values():
        assert all(row[key] > 0 for key in NUMBERS) and row["peak_growth_mib"] >= 0
    assert rows["haloformer", 64]["fwd_over_ours"] == 1.0
    assert {entry["name"] for entry in report["must_hold"]} == set(bench._RULES)
    output = capsys.readouterr().out
    assert "parity: ok" in output and "multiple of 16" in output and "halved window" in output
    assert files[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_backend_that_computes_something_else_is_not_timed():
    def one_key_short(query, key, value, global_key, global_value, band):
        out, lse = chunks.window_attention(query, key, value, global_key, global_value, band)
        return torch.cat([out[:, :-1], out[:, -1:] * 1.01], dim=1), lse

    said = []
    settings = bench.Settings((64,), 16, 2, 8, peers=(), threads=1)
    with pytest.raises(ParityError, match="float64 loops"):
        bench.measure(settings, said.append, one_key_short)
    assert said == ["parity"]


def test_an_error_that_only_long_sequences_show_is_found_by_dense_attention():
    def wrong_when_long(query, key, value, global_key, global_value, band):
        out, lse = chunks.window_attention(query, key, value, global_key, global_value, band)
        return (out * 1.01 if query.shape[1] > 50 else out), lse

    settings = bench.Settings((64,), 16, 2, 8, peers=(), threads=1)
    with pytest.raises(ParityError, match="dense attention, N=64"):
        bench.measure(settings, lambda line: None, wrong_when_long)


def test_memory_grows_by_what_a_run_holds():
    # Dense attention makes an N x N float mask: 2048 * 2048 * 4 bytes = 16 MiB.
    shape = bench_peers.Shape(2048, 32, 1, 8)
    assert 16 <= peak_growth_mib("dense", shape, "fwd", "chunks", 1) < 64
    assert peak_growth_mib("haloformer", shape, "fwd", "chunks", 1) < 8


def test_all_peers_can_be_named_and_bad_options_say_what_is_wrong(tmp_path, capsys):
    assert {"haloformer", *bench_command.PEERS} == set(bench_peers.MAKERS)
    for options, message in (
        (["--peers", "nobody"], "--peers names 'nobody'; known are"),
        (["--n", "600"], "--n 600 is below two windows of 512"),
        (["--window", "18"], "--window 18 is not a multiple of 4"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--json", str(tmp_path / "no" / "b.json")], "there is no folder"),
    ):
        assert main(["bench", "attention", *options]) == 2
        assert message in capsys.readouterr().err
