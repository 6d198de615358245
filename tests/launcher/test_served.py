"""Training over the network: shards by HTTP, a real tracking server, checkpoints in its S3.

Longer stories, with ranks that die and runs that go on, are in tests/faults/mlflow_away.py.
"""

import json
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient

from launcher_runs import haloformer, losses, newest_run, start, write_project
from servers import S3_KEYS, FileServer, TrackingServer, s3_server

BUCKET = "runs"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    return folder


@pytest.fixture(scope="module")
def s3_url():
    with s3_server(BUCKET) as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory, s3_url):
    server = TrackingServer(tmp_path_factory.mktemp("server"), s3_url, BUCKET)
    server.start()
    yield server
    server.stop()


def metric(client, run_id: str, key: str) -> list[tuple[int, float]]:
    """Points of a metric in the order in which they happened."""
    points = client.get_metric_history(run_id, key)
    points.sort(key=lambda point: (point.timestamp, point.step))
    return [(point.step, point.value) for point in points]


def test_a_server_that_is_killed_and_comes_back_has_all_of_the_run_once(
    project: Path, server: TrackingServer, s3_url: str, tmp_path: Path
) -> None:
    where = {"MLFLOW_TRACKING_URI": server.url}
    with FileServer(project / "data") as shards:
        words = [
            *("train", "tiny.yaml"),
            *(f"data.train={shards.url}/train", f"data.eval={shards.url}/eval"),
            f"data.cache.path={tmp_path / 'cache'}",
        ]
        started = start(project, [*words, "--ranks", "2"], where)
        started.wait_for_step(9)
        server.stop()
        started.wait_for_step(14)  # training goes on without it
        server.start()
        code, output = started.finish()
        assert code == 0, output
        assert "the tracking server is away" in output and "is back" in output
        assert "Retrying (" not in output
        run_dir = newest_run(project)
        run_id = run_dir.path.name
        client = MlflowClient(server.url)
        told = losses(run_dir)
        assert metric(client, run_id, "loss") == [(step, told[step]) for step in range(1, 25)]
        assert [step for step, _ in metric(client, run_id, "eval_loss")] == [0, 24]
        assert client.get_run(run_id).info.status == "FINISHED"
        check_page(client, run_id)
        check_checkpoints(project, s3_url, where)


def check_checkpoints(project: Path, s3_url: str, where: dict[str, str]) -> None:
    listed = haloformer(project, ["checkpoints", "latest", "--verify", "--json"], where)
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)["checkpoints"]
    assert found[0]["step"] == 24 and all(row["fault"] is None for row in found)
    client = boto3.client(
        "s3", endpoint_url=s3_url, region_name=S3_KEYS["AWS_DEFAULT_REGION"],
        aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    client.close()
    assert any(key.endswith("checkpoints/step-00000024/manifest.json") for key in keys)
    assert not (project / "mlruns").exists()


def check_page(client: MlflowClient, run_id: str) -> None:
    """A stranger sees what it is, who made it and how to go on."""
    run = client.get_run(run_id)
    tags, params = run.data.tags, run.data.params
    assert params["model.hidden_size"] == "32" and params["data.cache.limit_mib"] == "10240"
    for part in ("longformer_mlm", "2 ranks = data 1 x context 2", "--resume", run_id):
        assert part in tags["mlflow.note.content"]
    assert {"haloformer.host", "haloformer.torch", "haloformer.command"} <= set(tags)
    names = {info.path for info in client.list_artifacts(run_id)}
    assert {"checkpoints", "config.yaml", "environment.txt", "tokenizer", "loss.png"} <= names
