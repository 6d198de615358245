"""Take MLflow away from a real run, and see that it has all of it once it is back.

    python tests/faults/mlflow_away.py                  # every story
    python tests/faults/mlflow_away.py --story killed

A real `mlflow server --serve-artifacts` with its artifacts in an S3 on loopback, and two ranks:

    start    away when training starts, back while it goes on
    late     away all the time; `haloformer sync` when it is back
    during   killed in the middle, back before the end
    killed   killed in the middle, then rank 0; back for --resume

In each the loss of every step is in MLflow, once, in order, with the value that the ranks had;
checkpoints are whole, and the run is one run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of all tests

from launcher_runs import RunDir, haloformer, losses, newest_run, start, write_project
from servers import TrackingServer, s3_server

STEPS = 40


class Scene:
    """A project, and a tracking server that starts and stops.

    Args:
        folder: An empty folder.
        server: Stopped.
    """

    def __init__(self, folder: Path, server: TrackingServer) -> None:
        self.folder, self.server = folder, server
        self.where = {"MLFLOW_TRACKING_URI": server.url}
        self.train = ["train", "tiny.yaml", f"steps={STEPS}", "--ranks", "2"]
        write_project(folder)

    def command(self, *words: str) -> str:
        """What a command prints; it must succeed."""
        done = haloformer(self.folder, words, self.where)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def check(self, run_dir: RunDir) -> None:
        """MLflow has all of the run, once."""
        client = MlflowClient(self.server.url)
        experiment = client.get_experiment_by_name("haloformer")
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 1, [run.info.run_id for run in runs]
        run_id = runs[0].info.run_id
        points = client.get_metric_history(run_id, "loss")
        points.sort(key=lambda point: (point.timestamp, point.step))
        told = losses(run_dir)
        expected = [(step, told[step]) for step in range(1, STEPS + 1)]
        assert [(point.step, point.value) for point in points] == expected
        assert runs[0].info.status == "FINISHED", runs[0].info.status
        assert runs[0].data.params["steps"] == str(STEPS)
        names = {info.path for info in client.list_artifacts(run_id)}
        assert {"checkpoints", "config.yaml", "loss.png", "tokenizer"} <= names, names
        for known in {run_id, run_dir.path.name}:
            listed = self.command("checkpoints", known, "--verify")
            assert f"step {STEPS} " in listed and "damaged" not in listed, listed


def away_at_the_start(scene: Scene) -> None:
    """The server comes while training goes on."""
    started = start(scene.folder, scene.train, scene.where)
    run_dir = started.wait_for_step(3)
    scene.server.start()
    code, output = started.finish()
    assert code == 0 and "Training starts without it" in output, output
    scene.command("sync", "latest")  # the server may have come too late for the end of the run
    scene.check(run_dir)


def away_all_the_time(scene: Scene) -> None:
    """The server comes when the run is over."""
    output = scene.command(*scene.train)
    assert "sync" in output, output
    scene.server.start()
    told = scene.command("sync", "latest")
    assert "MLflow run" in told and " 0 records" not in told, told
    again = scene.command("sync", "latest")
    assert "0 records and 0 files" in again, again
    scene.check(newest_run(scene.folder))


def away_for_a_while(scene: Scene) -> None:
    """The server is killed, and comes back before the end."""
    scene.server.start()
    started = start(scene.folder, scene.train, scene.where)
    run_dir = started.wait_for_step(9)
    scene.server.stop()
    started.wait_for_step(14)
    scene.server.start()
    code, output = started.finish()
    assert code == 0, output
    scene.check(run_dir)


def killed_while_it_is_away(scene: Scene) -> None:
    """The server dies, then the rank that has told it of nothing since; both come back."""
    scene.server.start()
    often = [*scene.train[:3], "checkpoint.every=4", "--ranks", "2"]
    started = start(scene.folder, often, scene.where)
    run_dir = started.wait_for_step(12)
    scene.server.stop()
    started.wait_for_step(15)
    os.kill(run_dir.rank_pids()[0], signal.SIGKILL)
    code, output = started.finish()
    assert code != 0, output
    scene.server.start()
    output = scene.command(*scene.train, "--resume", "latest")
    assert "from step" in output, output
    scene.check(run_dir)


STORIES: dict[str, Callable[[Scene], None]] = {
    "start": away_at_the_start,
    "late": away_all_the_time,
    "during": away_for_a_while,
    "killed": killed_while_it_is_away,
}


def play(name: str) -> None:
    """Play one story in a new folder; raises AssertionError if MLflow lacks anything."""
    with tempfile.TemporaryDirectory() as place, s3_server("runs") as s3_url:
        home = Path(place)
        (home / "server").mkdir()
        (home / "project").mkdir()
        server = TrackingServer(home / "server", s3_url, "runs")
        try:
            STORIES[name](Scene(home / "project", server))
        finally:
            server.stop()


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--story", choices=STORIES, action="append", help="default: all")
    for name in parser.parse_args().story or STORIES:
        play(name)
        print(f"{name}: MLflow has all of the run, once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
