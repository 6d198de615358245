"""The phases of a run in MLflow: made once, told once, ended, whatever dies or is away."""

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from haloformer.configs.load import parse_config
from haloformer.configs.schema import TrackingConfig
from haloformer.launcher import tracker as tracker_module
from haloformer.launcher import tracking
from haloformer.launcher.children import PARENT_TAG, Children
from haloformer.launcher.known_runs import KnownRun, find_runs, read_known, start_run
from haloformer.launcher.sender import Sender
from haloformer.launcher.spool import Spool
from haloformer.launcher.sync import deliver
from haloformer.launcher.tracker import Tracker
from launcher_runs import TINY
from ports import away

PATIENCE_S = 120.0

CONFIG = parse_config(
    {
        **{key: value for key, value in TINY.items() if key != "steps"},
        "phases": [
            {"name": "short", "steps": 4, "seq_len": 64, "attention_window": [8, 16]},
            {"steps": 6, "learning_rate": 1e-4, "global_batch": 8},
        ],
    },
    "recipe",
)
SHORT, LONG = CONFIG.all_phases()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def run(database: str, tmp_path: Path) -> KnownRun:
    config = TrackingConfig(artifacts=str(tmp_path / "artifacts"), experiment=tmp_path.name)
    return start_run(tracking.connect(database), database, config, "tiny", tmp_path / "runs")


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """A run does not wait long for MLflow at its end; what it sends is what is tested here."""
    monkeypatch.setattr(tracker_module, "_PATIENCE_S", PATIENCE_S)


def folder_of(run: KnownRun, tmp_path: Path) -> Path:
    return tmp_path / "runs" / run.run_id


def children(run: KnownRun):
    client = MlflowClient(run.tracking_uri)
    experiment = client.get_run(run.mlflow_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{run.mlflow_id}'")
    return {child.info.run_name: child for child in found}


def history(run: KnownRun, run_id: str) -> list[tuple[int, float]]:
    client = MlflowClient(run.tracking_uri)
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, "loss"))


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, {"loss": 1.0 / step})


def whole(run: KnownRun) -> None:
    """Both phases, each with its steps and parameters; the run has all steps."""
    assert history(run, run.mlflow_id) == [(step, 1.0 / step) for step in range(1, 11)]
    named = children(run)
    assert set(named) == {"short", "phase-1"}
    for name, steps in (("short", range(1, 5)), ("phase-1", range(5, 11))):
        assert history(run, named[name].info.run_id) == [(step, 1.0 / step) for step in steps]
        assert named[name].info.status == "FINISHED"
    short, long = named["short"].data.params, named["phase-1"].data.params
    assert (short["data.seq_len"], long["data.seq_len"]) == ("64", "128")
    assert (short["model.attention_window"], long["batch.global_batch"]) == ("[8, 16]", "8")
    assert (short["steps"], long["optim.learning_rate"]) == ("4", "0.0001")
    assert MlflowClient(run.tracking_uri).get_run(run.mlflow_id).info.status == "FINISHED"


def finish(tracker: Tracker, first: int) -> None:
    """The rest of the run from a step, as the trainer tells it."""
    if first <= 4:
        tracker.begin_phase(SHORT)
        log(tracker, range(first, 5))
        tracker.end_phase(SHORT)
        first = 5
    tracker.begin_phase(LONG)
    log(tracker, range(first, 11))
    tracker.end_phase(LONG)
    tracker.close("FINISHED")


def test_each_phase_is_a_run_below_the_run_and_latest_finds_the_run(run, tmp_path: Path) -> None:
    finish(Tracker(folder_of(run, tmp_path), None, [SHORT, LONG]), 1)
    whole(run)
    config = TrackingConfig(experiment=tmp_path.name)
    elsewhere = tmp_path / "no runs here"  # so that MLflow is asked
    for recipe in (None, "tiny"):
        found = list(find_runs("latest", config, run.tracking_uri, recipe, elsewhere))
        assert [one.run_id for one in found] == [run.run_id]


def test_records_that_are_sent_again_make_no_second_child(run, tmp_path: Path) -> None:
    """As when a process dies after making a child, or in the middle of anything after it."""
    spool = Spool(folder_of(run, tmp_path))
    params = {key: str(value) for key, value in SHORT.settings().items()}
    client = tracking.connect(run.tracking_uri)
    Children(client, run.mlflow_id).begin(0, "short", 5, params)  # it died before it said so
    spool.add_phase(0, "short", params)
    for step in range(1, 5):
        spool.add_metrics(step, {"loss": 1.0 / step}, 0)
    spool.add_status("FINISHED", 0)
    for _ in range(2):
        assert Sender(spool).send_all() == 6
        spool.mark(0)
    named = children(run)
    assert list(named) == ["short"]
    assert len(history(run, named["short"].info.run_id)) == 4
    assert history(run, run.mlflow_id) == history(run, named["short"].info.run_id)


@pytest.mark.parametrize("died_after", [3, 4, 7])
def test_a_killed_run_goes_on_in_the_same_children(run, tmp_path: Path, died_after: int) -> None:
    """Killed in the first phase, at its end (which it cannot tell any more), in the second."""
    folder = folder_of(run, tmp_path)
    first = Tracker(folder, None, [SHORT, LONG])
    first.begin_phase(SHORT)
    log(first, range(1, min(died_after, 4) + 1))
    if died_after > 4:
        first.end_phase(SHORT)
        first.begin_phase(LONG)
        log(first, range(5, died_after + 1))
    first._sampler.stop()
    first._sender.finish(PATIENCE_S)
    Spool(folder).add_status("FAILED")  # the launcher's word
    deliver(folder)
    named = children(run)
    state = "FINISHED" if died_after > 4 else "FAILED"
    assert named["short"].info.status == state
    assert died_after < 5 or named["phase-1"].info.status == "FAILED"
    resumed_at = {3: 2, 4: 4, 7: 6}[died_after]
    finish(Tracker(folder, resumed_at, [SHORT, LONG]), resumed_at + 1)
    whole(run)


def test_going_back_into_a_phase_that_was_done_opens_it_again(run, tmp_path: Path) -> None:
    """The newest checkpoint was damaged, or there was none yet."""
    folder = folder_of(run, tmp_path)
    spool = Spool(folder)
    for number, phase in enumerate((SHORT, LONG)):
        spool.add_phase(number, phase.name, {})
    spool.add_status("FINISHED", 0)
    spool.add_status("KILLED")
    assert spool.phase_states() == {0: "FINISHED", 1: "KILLED"}
    tracker = Tracker(folder, 2, [SHORT, LONG])
    tracker.begin_phase(SHORT)
    assert spool.phase_states() == {0: "RUNNING", 1: "KILLED"}
    tracker.end_phase(SHORT)
    tracker.begin_phase(LONG)
    assert spool.phase_states() == {0: "FINISHED", 1: "RUNNING"}
    tracker.close("KILLED")
    assert {child.info.status for child in children(run).values()} == {"FINISHED", "KILLED"}


def test_a_run_that_began_without_its_server_gets_its_children_when_it_is_back(
    database: str, tmp_path: Path
) -> None:
    config = TrackingConfig(experiment=tmp_path.name, artifacts=str(tmp_path / "served"))
    with away() as url:
        run = start_run(None, url, config, "tiny", tmp_path / "runs")
        folder = folder_of(run, tmp_path)
        tracker = Tracker(folder, None, [SHORT, LONG])
        replace(run, tracking_uri=database).save(folder)
        finish(tracker, 1)
    deliver(folder)
    known = read_known(folder)
    assert known is not None
    whole(known)


def test_a_child_that_somebody_deleted_is_missed_and_the_rest_arrives(
    run, tmp_path: Path, caplog
) -> None:
    spool = Spool(folder_of(run, tmp_path))
    spool.add_phase(0, "short", {})
    Sender(spool).send_all()
    MlflowClient(run.tracking_uri).delete_run(children(run)["short"].info.run_id)
    spool.add_metrics(1, {"loss": 1.0}, 0)
    spool.add_status("FINISHED", 0)
    assert Sender(spool).send_all() == 2
    assert history(run, run.mlflow_id) == [(1, 1.0)]
    assert caplog.text.count("phase 0 of run") == 1


def test_a_run_without_phases_has_no_children(run, tmp_path: Path) -> None:
    tracker = Tracker(folder_of(run, tmp_path), None)
    log(tracker, range(1, 4))
    tracker.close("FINISHED")
    assert children(run) == {} and len(history(run, run.mlflow_id)) == 3
