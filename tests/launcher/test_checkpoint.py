"""Ranks that are killed in the middle of a checkpoint, and what the next start finds.

The ranks are in tests/checkpoint_ranks.py; what they left behind is looked at here.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from checkpoint_ranks import STATE
from dying import PHASES
from haloformer.launcher.catalog import Catalog
from servers import TrackingServer

TESTS = Path(__file__).parents[1]
# The others leave the same things behind as these do.
RECOVERED = ["file_half_written", "manifest_half_written", "before_prune"]


def run_jobs(folder, jobs):
    """Results of jobs, by name."""
    spec = folder / "spec.json"
    results = folder / "results.json"
    spec.write_text(json.dumps({"results": str(results), "jobs": list(jobs.values())}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / "checkpoint_ranks.py"), str(spec)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(jobs, json.loads(results.read_text()), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def client(folder):
    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def experiment(client, folder):
    return client.create_experiment("x", artifact_location=str(folder / "artifacts"))


@pytest.fixture(scope="module")
def server(folder):
    """A real tracking server that keeps the artifacts to itself; its address."""
    server = TrackingServer(folder)
    server.start()
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def runs(client, experiment):
    """One MLflow run for each story."""
    names = ["whole", "damaged", "full", "overlapped", *PHASES]
    return {name: client.create_run(experiment).info.run_id for name in names}


@pytest.fixture(scope="module")
def served(server):
    """A run of the server: {"uri", "run"}."""
    client = MlflowClient(server)
    return {"uri": server, "run": client.create_run(client.create_experiment("x")).info.run_id}


@pytest.fixture(scope="module")
def first(client, runs, served, folder):
    """The undisturbed run, one for later damage, a full disk, and a death in every phase."""
    jobs = {
        "whole": {"action": "uninterrupted"},
        "damaged": {"action": "uninterrupted"},
        "full": {"action": "unwritable"},
        "overlapped": {"action": "overlapped"},
    }
    jobs |= {phase: {"action": "killed", "phase": phase} for phase in PHASES}
    for name, job in jobs.items():
        job |= {"uri": client.tracking_uri, "run": runs[name]}
    jobs["served"] = {"action": "uninterrupted", **served}
    return run_jobs(folder, jobs)


@pytest.fixture(scope="module")
def found(client, runs, first):
    """Steps that each run offered after the first start, before any recovery."""
    return {name: [m.step for m in Catalog(client, run).committed()] for name, run in runs.items()}


@pytest.fixture(scope="module")
def second(client, runs, found, served, folder):
    """The second start: recovery of some, after a byte of the damaged run was flipped."""
    flipped = flip_a_byte(client, runs["damaged"], 3)
    jobs = {name: {"action": "recovered"} for name in [*RECOVERED, "damaged"]}
    jobs["refused"] = {"action": "refused", "step": 3}
    for name, job in jobs.items():
        job |= {"uri": client.tracking_uri, "run": runs.get(name, runs["damaged"])}
    jobs["served"] = {"action": "recovered", **served}
    # The damaged run repairs itself: ask what `load` says of it before.
    order = ["refused", *RECOVERED, "damaged", "served"]
    return run_jobs(folder, {name: jobs[name] for name in order}), flipped


def flip_a_byte(client, run_id, step):
    catalog = Catalog(client, run_id)
    entry = catalog.find(step).files[1]
    file = catalog.artifacts.local_path(f"checkpoints/step-{step:08d}/{entry.name}")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return entry.name


def test_an_undisturbed_run_keeps_the_last_two(found):
    assert found["whole"] == [3, 2]


@pytest.mark.parametrize("phase", PHASES)
def test_a_checkpoint_cut_short_is_never_offered(phase, first, found):
    assert found[phase] == ([2, 1] if phase == "before_prune" else [1])


@pytest.mark.parametrize("phase", RECOVERED)
def test_a_killed_run_goes_on_bit_for_bit(phase, first, second):
    results, _ = second
    recovered, truth = results[phase], first["whole"]["history"]
    assert recovered["found"] == (2 if phase == "before_prune" else 1)
    assert recovered["state"] == STATE
    assert recovered["history"] == truth[recovered["found"] :]


@pytest.mark.parametrize("phase", RECOVERED)
def test_nothing_of_a_failed_attempt_stays(phase, second, client, runs):
    catalog = Catalog(client, runs[phase])
    assert catalog.steps() == [3, 2]
    for manifest in catalog.committed():
        assert catalog.verify(manifest) is None
        folder = catalog.artifacts.local_path(f"checkpoints/step-{manifest.step:08d}")
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert files == {"manifest.json", *(entry.name for entry in manifest.files)}


def test_a_flipped_byte_is_refused_by_file_name(second):
    results, flipped = second
    error = results["refused"]["error"]
    assert flipped in error and "step-00000003" in error and "\n" not in error


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(second, first):
    results, _ = second
    assert results["damaged"]["found"] == 2
    assert results["damaged"]["history"] == first["whole"]["history"][2:]


def test_going_over_a_damaged_step_again_repairs_it(second, client, runs):
    catalog = Catalog(client, runs["damaged"])
    assert [m.step for m in catalog.committed()] == [3, 2]
    assert catalog.newest_valid().step == 3


def test_passing_over_warns_with_the_file_name(client, runs, second, caplog):
    flipped = flip_a_byte(client, runs["damaged"], 3)
    with caplog.at_level(logging.WARNING):
        assert Catalog(client, runs["damaged"]).newest_valid().step == 2
    assert flipped in caplog.text


def test_a_rank_that_cannot_write_is_heard_on_all(first):
    told = dict(first["full"]["told"])
    assert told.keys() == {7, 8, 9} and told[8] is None
    for number, said in ((7, told[7]), (9, told[9])):
        wanted = f"checkpoint step {number} failed (rank 1: OSError: [Errno 28] No space left"
        assert said.startswith(wanted)
        assert "\n" not in said


def test_a_failed_checkpoint_leaves_nothing_and_the_last_is_tried_again(first):
    assert first["full"]["left"] == ["step-00000008"]
    assert first["full"]["committed"] == [9, 8]


def test_training_goes_on_while_a_checkpoint_is_uploaded(first):
    seen = first["overlapped"]
    assert seen["early"] == []
    assert seen["told"] == [1], "the next save waits for the one before, and for no more"


def test_what_is_saved_is_what_was_when_save_was_called(first):
    seen = first["overlapped"]
    assert seen["history"] == first["whole"]["history"][:2]
    assert seen["again"] == seen["history"][1:]


def test_the_manifest_says_what_was_run(client, runs, first):
    manifest = Catalog(client, runs["whole"]).find(3)
    assert manifest.layout.model_dump() == {
        "data": 1,
        "context": 2,
        "tensor": 1,
        "zero_stage": 1,
        "precision": "fp32",
    }
    assert manifest.train_config().name == "tiny"
    assert len(manifest.config_hash) == 64
    assert manifest.state == STATE


def test_checkpoints_travel_through_a_tracking_server(served, first, second, folder):
    assert first["served"]["history"] == first["whole"]["history"]
    assert second[0]["served"] == {"found": 3, "state": STATE, "history": []}
    catalog = Catalog(MlflowClient(served["uri"]), served["run"])
    assert catalog.artifacts.local_path("checkpoints") is None
    assert [m.step for m in catalog.committed()] == [3, 2]
    assert catalog.verify(catalog.find(3)) is None
    file = next((folder / "served").rglob("step-00000003/data-*/shard-00002-*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file.name} has" in catalog.verify(catalog.find(3))
    assert catalog.newest_valid().step == 2
