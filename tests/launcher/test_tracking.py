"""What MLflow is told of a run: in order, once, whatever dies or is away meanwhile."""

import logging
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import ports
from haloformer.configs.schema import TrackingConfig
from haloformer.data_pipeline.retry import RetryPolicy
from haloformer.launcher import tracker as tracker_module
from haloformer.launcher import tracking
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.cli import main
from haloformer.launcher.known_runs import KnownRun, create_run, find_runs, read_known, start_run
from haloformer.launcher.sender import BackgroundSender, Sender
from haloformer.launcher.spool import Spool
from haloformer.launcher.sync import deliver
from haloformer.launcher.system_metrics import SystemSampler
from haloformer.launcher.tracker import Tracker
from servers import FileServer
from written_checkpoint import write_checkpoint

PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def away() -> Iterator[str]:
    with ports.away() as url:
        yield url


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """A run does not wait long for MLflow at its end; what it sends is what is tested here."""
    monkeypatch.setattr(tracker_module, "_PATIENCE_S", PATIENCE_S)


@pytest.fixture
def run(database: str, tmp_path: Path) -> KnownRun:
    config = TrackingConfig(artifacts=str(tmp_path / "artifacts"), experiment=tmp_path.name)
    return start_run(tracking.connect(database), database, config, "tiny", tmp_path / "runs")


def history(run: KnownRun, key: str) -> list[tuple[int, float]]:
    client = MlflowClient(run.tracking_uri)
    return [(m.step, m.value) for m in client.get_metric_history(run.mlflow_id, key)]


def folder_of(run: KnownRun, tmp_path: Path) -> Path:
    return tmp_path / "runs" / run.run_id


def test_records_that_are_sent_twice_arrive_once(run, tmp_path: Path) -> None:
    """As when a process dies between sending and noting it."""
    spool = Spool(folder_of(run, tmp_path))
    spool.add_params({f"p{number}": "x" for number in range(150)})
    for step in range(1, 130):
        spool.add_metrics(step, {"loss": 1.0 / step, "grad_norm": float("nan")})
    (spool.folder / "notes.txt").write_text("hello")
    spool.add_artifact(spool.folder / "notes.txt", "documents")
    spool.add_status("FINISHED")
    assert Sender(spool).send_all() == 132
    assert Sender(spool).send_all() == 0
    spool.mark(0)
    assert Sender(spool).send_all() == 132
    expected = [(step, 1.0 / step) for step in range(1, 130)]
    assert history(run, "loss") == expected
    assert len(history(run, "grad_norm")) == 129
    stored = MlflowClient(run.tracking_uri).get_run(run.mlflow_id)
    assert len(stored.data.params) == 150 and stored.info.status == "FINISHED"
    assert run.artifacts().read_text("documents/notes.txt") == "hello"


def test_a_line_that_a_crash_cut_short_hides_no_other(run, tmp_path: Path) -> None:
    spool = Spool(folder_of(run, tmp_path))
    spool.add_metrics(1, {"loss": 1.0})
    with (spool.folder / "spool.jsonl").open("a") as file:
        file.write('{"step": 2, "metr')
    assert [record.content["step"] for record in spool.pending(9)] == [1]
    spool.add_metrics(3, {"loss": 3.0})
    Sender(spool).send_all()
    assert history(run, "loss") == [(1, 1.0), (3, 3.0)]


def test_a_step_never_waits_for_a_server_that_does_not_answer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "_CONNECT_S", 2 * PATIENCE_S)  # the sender waits so long
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = start_run(None, address, TrackingConfig(), "tiny", tmp_path / "runs")
        tracker = Tracker(folder_of(run, tmp_path), None)
        tracker.log(1, {"loss": 1.0})
        asked, _ = silent.accept()  # the sender waits for an answer now
        start = time.perf_counter()
        for step in range(2, 101):
            tracker.log(step, {"loss": 1.0 / step})
        assert time.perf_counter() - start < PATIENCE_S
        asked.close()
    tracker.close("KILLED")
    waiting = [record.content for record in Spool(folder_of(run, tmp_path)).pending(200)]
    assert sum("loss" in content.get("metrics", ()) for content in waiting) == 100


def test_a_run_that_begins_without_its_server_becomes_one_run_when_it_is_back(
    database: str, away: str, tmp_path: Path
) -> None:
    config = TrackingConfig(experiment=tmp_path.name, artifacts=str(tmp_path / "served"))
    run = start_run(None, away, config, "tiny", tmp_path / "runs")
    folder = folder_of(run, tmp_path)
    assert run.began_without_server and run.artifacts().local_path("x") == folder / "artifacts/x"
    tracker = Tracker(folder, None)
    for step in range(1, 101):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close("FINISHED")
    with pytest.raises(tracking.TrackingAwayError, match="does not answer"):
        deliver(folder)
    # The server is back: here a database, so that the test need not wait for one.
    replace(run, tracking_uri=database).save(folder)
    client = tracking.connect(database)
    twin = create_run(client, read_known(folder))  # made, and the process died before it said so
    waiting = len(Spool(folder).pending(999))  # 101, and of the machine's load now and then
    sent, copied, mlflow_id = deliver(folder)
    assert (sent, copied, mlflow_id) == (waiting, 0, twin.info.run_id)
    assert deliver(folder) == (0, 0, mlflow_id)
    back = read_known(folder)
    assert history(back, "loss") == [(step, 1.0 / step) for step in range(1, 101)]
    stored = client.get_run(mlflow_id)
    assert stored.info.status == "FINISHED" and stored.info.start_time == run.started_ms
    found = client.search_runs([stored.info.experiment_id])
    assert [one.info.run_id for one in found] == [mlflow_id]
    known = list(find_runs("latest", config, database, "tiny", tmp_path / "runs"))
    assert [one.run_id for one in known] == [run.run_id]


def test_steps_that_are_trained_again_are_told_once(run, tmp_path: Path) -> None:
    folder = folder_of(run, tmp_path)
    spool = Spool(folder)
    for step in range(1, 8):  # sent or not: the process died after step 7
        spool.add_metrics(step, {"loss": 1.0 / step, "step_seconds": 0.5})
    tracker = Tracker(folder, resume_step=4)
    for step in range(5, 11):
        tracker.log(step, {"loss": 1.0 / step * (1 + 1e-7), "step_seconds": 0.7})
    tracker.log(7, {"eval_loss": 2.0})
    tracker.log(6, {"loss": 9.0, "step_seconds": 0.7})  # another history than before: it is told
    tracker.close("FINISHED")
    assert sorted(step for step, _ in history(run, "step_seconds")) == sorted([*range(1, 11), 6])
    assert history(run, "eval_loss") == [(7, 2.0)]


def test_one_process_sends_at_a_time(run, tmp_path: Path) -> None:
    spool = Spool(folder_of(run, tmp_path))
    spool.add_metrics(1, {"loss": 1.0})
    with spool.sending() as mine:
        assert mine
        with pytest.raises(ValueError, match="sends by itself"):
            deliver(spool.folder)
        background = BackgroundSender(spool.folder)
    background.finish(PATIENCE_S)
    assert history(run, "loss") == [(1, 1.0)]


def test_a_server_that_refuses_is_no_server_that_is_away(run, tmp_path: Path, caplog) -> None:
    MlflowClient(run.tracking_uri).delete_run(run.mlflow_id)
    spool = Spool(folder_of(run, tmp_path))
    spool.add_metrics(1, {"loss": 1.0})
    background = BackgroundSender(spool.folder)
    background.finish(PATIENCE_S)
    assert "MLflow refuses records of this run" in caplog.text
    assert len(spool.pending(9)) == 1  # nothing is dropped
    with pytest.raises(MlflowException):
        deliver(spool.folder)


def test_sync_says_what_it_did_and_what_it_cannot(
    run, away: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.tracking_uri)
    Spool(folder_of(run, tmp_path)).add_metrics(1, {"loss": 1.0})
    assert main(["sync", "latest", "--experiment", tmp_path.name]) == 0
    told = capsys.readouterr().out
    assert told == f"run {run.run_id}: 1 records and 0 files sent; MLflow run {run.run_id}\n"
    assert main(["sync", "0" * 32]) == 2
    assert "not found" in capsys.readouterr().err
    lost = start_run(None, away, TrackingConfig(), "tiny", tmp_path / "runs")
    Spool(folder_of(lost, tmp_path)).add_metrics(1, {"loss": 1.0})
    assert main(["sync", lost.run_id]) == 2
    assert "nothing is lost, sync again" in capsys.readouterr().err


def test_checkpoints_of_a_run_without_a_server_are_copied_to_it(
    database: str, away: str, tmp_path: Path
) -> None:
    run = start_run(None, away, TrackingConfig(experiment=tmp_path.name), "t", tmp_path / "runs")
    folder = folder_of(run, tmp_path)
    source = Path(run.artifact_uri)
    for step in (8, 16):
        write_checkpoint(source, step)
    place = str(tmp_path / "served")
    replace(run, tracking_uri=database, location=place).save(folder)
    _, copied, mlflow_id = deliver(folder)
    assert copied == 4
    served = ArtifactFolder.of_run(tracking.connect(database), mlflow_id)
    assert sorted(served.list_folder("checkpoints")) == ["step-00000008", "step-00000016"]
    (source / "checkpoints" / "step-00000008" / "manifest.json").unlink()  # pruned since
    assert deliver(folder)[1] == 0
    assert served.list_folder("checkpoints") == ["step-00000016"]
    shutil.rmtree(source)  # to make room, now that the server has them
    assert deliver(folder)[1] == 0
    assert served.list_folder("checkpoints") == ["step-00000016"]


def test_what_a_database_refuses_is_logged_without_a_traceback(database: str) -> None:
    tracking.connect(database)
    log = logging.getLogger("mlflow.store.db.utils")
    record = logging.makeLogRecord({"levelno": logging.ERROR, "msg": "it is full"})
    assert log.filter(record)
    record.exc_info = (ValueError, ValueError("full"), None)
    assert not log.filter(record)


def test_a_file_among_the_folders_of_runs_is_no_run(run, database: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    config = TrackingConfig(experiment=tmp_path.name)
    found = list(find_runs("latest", config, database, "tiny", tmp_path / "runs"))
    assert [known.run_id for known in found] == [run.run_id]


def test_system_metrics_count_on_from_the_start_of_the_run() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    started = int(time.time() * 1000) - 60_000
    sampler = SystemSampler(lambda *sample: told.append(sample), started, interval_s=0.02)
    while len(told) < 3:
        sampler._stopped.wait(0.01)
    sampler.stop()
    numbers = [number for number, _ in told]
    assert numbers == sorted(numbers) and numbers[0] >= 60 / 0.02
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(
        told[0][1]
    )


def test_a_store_that_fails_for_a_while_is_asked_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    policy = RetryPolicy(attempts=4, first_wait_s=0.001, longest_wait_s=0.001)
    path = tmp_path / "file"
    path.write_text("content")
    with FileServer(tmp_path / "served") as server:
        store = ArtifactFolder("mlflow-artifacts:/0/abc/artifacts", server.url, policy)
        server.faults.extend([503, "drop", 500])
        store.upload(path, "folder")
        place = "api/2.0/mlflow-artifacts/artifacts/0/abc/artifacts/folder/file"
        assert (server.folder / place).read_text() == "content"
        assert len(server.requests) == 4
        server.faults.append(403)
        with pytest.raises(OSError, match="403"):
            store.upload(path, "folder")
        assert len(server.requests) == 5
        server.faults.extend([503] * 4)
        with pytest.raises(MlflowException, match="503"):
            store.upload(path, "folder")
        assert len(server.requests) == 9


def test_the_settings_of_a_wrong_server_are_an_error_not_an_absence() -> None:
    with pytest.raises(tracking.TrackingError) as error:
        tracking.connect("nonsense://somewhere")
    assert not isinstance(error.value, tracking.TrackingAwayError)
