"""Which checkpoints exist, which stay, and what is refused; written by hand, without ranks."""

import json
import logging
import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from full_disk import mounted
from haloformer.configs.load import config_hash
from haloformer.launcher.catalog import MANIFEST, Catalog, check_disk, folder_of, required_bytes
from haloformer.launcher.cli import main
from haloformer.launcher.manifest import (
    FileEntry,
    LayoutRecord,
    Manifest,
    ManifestError,
    describe_file,
    fault_of_file,
)
from haloformer.launcher.run_dir import Beat, RunDir
from layouts import Case, tiny_config


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('db')}/mlflow.db")


@pytest.fixture
def catalog(client, tmp_path):
    experiment = client.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "art"))
    return Catalog(client, client.create_run(experiment).info.run_id)


def manifest_of(step, files):
    config = tiny_config(Case(1, 1, 0))
    return Manifest(
        format=1,
        step=step,
        config=config.model_dump(mode="json"),
        config_hash=config_hash(config),
        layout=LayoutRecord(data=1, context=1, tensor=1, zero_stage=0, precision="fp32"),
        state={"data": {"10": 1, "9": 2}},
        files=files,
    )


def write(catalog, step, attempt="0123456789abcdef", commit=True):
    """A checkpoint of one small file; its path."""
    folder = catalog.artifacts.local_path(folder_of(step))
    file = folder / f"data-{attempt}" / "shard-00001-x.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights %d" % step)
    if commit:
        entry = describe_file(file, f"{file.parent.name}/{file.name}")
        catalog.artifacts.write_text(
            f"{folder_of(step)}/{MANIFEST}", manifest_of(step, [entry]).to_text()
        )
    return file


def steps_of(catalog):
    return [manifest.step for manifest in catalog.committed()]


def test_a_run_without_checkpoints_has_none(catalog):
    assert steps_of(catalog) == []
    assert catalog.newest_valid() is None
    with pytest.raises(ValueError, match="no committed checkpoint at step 5; it has none"):
        catalog.find(5)


def test_newest_first_by_number_not_by_name(catalog):
    for step in (5, 1000, 20):
        write(catalog, step)
    assert steps_of(catalog) == [1000, 20, 5]
    assert catalog.newest_valid().step == 1000
    with pytest.raises(ValueError, match="at step 7; it has 1000, 20, 5"):
        catalog.find(7)


def test_files_without_a_manifest_are_no_checkpoint(catalog):
    write(catalog, 1)
    write(catalog, 2, commit=False)
    assert steps_of(catalog) == [1]


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999])
def test_a_cut_manifest_is_no_checkpoint(keep, catalog, caplog):
    write(catalog, 1)
    write(catalog, 2)
    path = catalog.artifacts.local_path(f"{folder_of(2)}/{MANIFEST}")
    text = path.read_text()
    path.write_text(text[: keep if isinstance(keep, int) else int(len(text) * keep)])
    with caplog.at_level(logging.WARNING):
        assert steps_of(catalog) == [1]
    assert "step-00000002/manifest.json" in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_the_one_before_taken(damage, catalog, caplog):
    write(catalog, 1)
    file = write(catalog, 2)
    if damage == "flip":
        file.write_bytes(b"Weights 2")
    elif damage == "cut":
        file.write_bytes(b"weights ")
    else:
        file.unlink()
    fault = catalog.verify(catalog.find(2))
    assert fault.startswith(f"{folder_of(2)}/data-0123456789abcdef/shard-00001-x.safetensors ")
    with caplog.at_level(logging.WARNING):
        assert catalog.newest_valid().step == 1
    assert fault in caplog.text


def test_a_manifest_in_the_folder_of_another_step_is_left_out(catalog, caplog):
    file = write(catalog, 3)
    file.parents[1].rename(file.parents[1].with_name("step-00000004"))
    assert steps_of(catalog) == []
    assert "step-00000004/manifest.json" in caplog.text and "it says step 3" in caplog.text


def test_pruning_keeps_the_last_and_every_nth(catalog):
    for step in range(10, 80, 10):
        write(catalog, step)
    catalog.prune(catalog.find(70), keep_last=2, keep_every=30)
    assert steps_of(catalog) == [70, 60, 30]


def test_pruning_sweeps_what_was_never_committed(catalog):
    write(catalog, 10)
    write(catalog, 15, commit=False)
    write(catalog, 20, attempt="f" * 16, commit=False)
    write(catalog, 20)
    catalog.prune(catalog.find(20), keep_last=2, keep_every=None)
    assert catalog.steps() == [20, 10]
    assert catalog.artifacts.list_folder(folder_of(20)) == ["data-0123456789abcdef", MANIFEST]
    assert catalog.verify(catalog.find(20)) is None


def test_pruning_drops_steps_of_an_abandoned_future(catalog):
    for step in (10, 20, 30, 25):
        write(catalog, step)
    catalog.prune(catalog.find(25), keep_last=2, keep_every=10)
    assert steps_of(catalog) == [25, 20, 10]


def test_a_removal_takes_the_manifest_first(catalog, monkeypatch):
    write(catalog, 1)
    deleted = []
    delete = catalog.artifacts.delete
    monkeypatch.setattr(
        catalog.artifacts, "delete", lambda name: (deleted.append(name), delete(name))
    )
    catalog.remove(1)
    assert deleted == [f"{folder_of(1)}/{MANIFEST}", folder_of(1)]
    assert catalog.steps() == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "."])
def test_names_stay_in_the_artifact_folder(name, catalog):
    for use in (
        catalog.artifacts.local_path,
        catalog.artifacts.delete,
        catalog.artifacts.read_text,
    ):
        with pytest.raises(ValueError, match="leaves the run's artifact folder"):
            use(name)


@pytest.mark.parametrize(
    "name",
    [
        "shard.safetensors",
        "data-0123456789abcdef/../x.safetensors",
        "/data-0123456789abcdef/x.safetensors",
        "data-0123456789abcdef/a/x.safetensors",
        "data-0123456789abcdef/x.pkl",
        "data-0123456789abcdef/x.safetensors\n",
    ],
)
def test_a_manifest_cannot_name_files_elsewhere(name):
    with pytest.raises(ValueError, match="name"):
        FileEntry(name=name, size=1, sha256="0" * 64)


def test_a_manifest_survives_its_text():
    entry = FileEntry(name="data-0123456789abcdef/x.safetensors", size=1, sha256="0" * 64)
    manifest = manifest_of(3, [entry])
    assert Manifest.from_text(manifest.to_text()) == manifest


def test_numbers_as_keys_survive_as_text():
    entry = FileEntry(name="data-0123456789abcdef/x.safetensors", size=1, sha256="0" * 64)
    manifest = manifest_of(3, [entry]).model_copy(update={"state": {"data": {10: 1, 9: 2}}})
    assert Manifest.from_text(manifest.to_text()).state == {"data": {"10": 1, "9": 2}}


def test_an_altered_manifest_is_refused():
    entry = FileEntry(name="data-0123456789abcdef/x.safetensors", size=1, sha256="0" * 64)
    body = json.loads(manifest_of(3, [entry]).to_text())
    body["step"] = 4
    with pytest.raises(ManifestError, match="its own sha256 differs"):
        Manifest.from_text(json.dumps(body))
    with pytest.raises(ManifestError, match="format 2; this version reads format 1"):
        Manifest.from_text(json.dumps({**body, "format": 2}))
    with pytest.raises(ManifestError, match="format 'list'"):
        Manifest.from_text("[]")


def test_equal_files_have_no_fault(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"1234")
    assert fault_of_file(describe_file(file, "data-0123456789abcdef/x.safetensors"), file) is None


def test_a_file_on_a_bad_spot_of_the_disk_is_damaged():
    unreadable = Path("/proc/self/mem")  # reading its first page is an input/output error
    entry = FileEntry(name="data-0123456789abcdef/x.safetensors", size=0, sha256="0" * 64)
    fault = fault_of_file(entry, unreadable)
    assert fault == f"{entry.name} cannot be read (Input/output error)"


def test_too_little_disk_is_said_with_numbers(tmp_path):
    check_disk(str(tmp_path / "not" / "there" / "yet"), tmp_path, num_parameters=1000, keep_last=2)
    with pytest.raises(ValueError, match=r"3 of .* GiB .* need .* GiB and .* GiB are free"):
        check_disk(f"file://{tmp_path}", tmp_path, num_parameters=10**15, keep_last=2)
    # A server's disk is not ours to measure, but the staging folder is.
    with pytest.raises(ValueError, match=f"checkpoints in {tmp_path}: 1 of"):
        check_disk("mlflow-artifacts:/1", tmp_path, num_parameters=10**15, keep_last=2)


@pytest.mark.root
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with mounted(tmp_path / "fixed", "ro") as fixed:
        for location, staging in ((fixed, tmp_path), (tmp_path, fixed / "runs")):
            with pytest.raises(ValueError, match=f"{fixed} cannot be written; go to a folder"):
                check_disk(str(location), staging, num_parameters=1000)


def test_required_bytes_bounds_the_real_size(walked):
    _, folder = walked
    num_parameters = 37 * 12 + 37 + (12 * 36 + 36) + (36 * 12 + 12) + 24
    files = (folder / str(Case(2, 2, 1))).glob("*.safetensors")
    written = sum(file.stat().st_size for file in files)
    assert 12 * num_parameters < written < required_bytes(num_parameters)


@pytest.fixture
def prune(catalog, client, tmp_path, monkeypatch, capsys):
    """The command, for a run whose ranks beat last so many seconds ago; exit code and errors."""

    def command(seconds_ago, code=None):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        run_dir = RunDir(Path("runs", catalog.run_id))
        run_dir.create()
        if seconds_ago is not None:
            run_dir.write_beat(0, Beat("attempt", 1, 3, code))
            beat = run_dir.path / "ranks" / "0.beat"
            os.utime(beat, (beat.stat().st_mtime - seconds_ago,) * 2)
        done = main(["checkpoints", catalog.run_id, "--prune"])
        return done, capsys.readouterr().err

    return command


def test_prune_frees_what_a_killed_run_left_and_keeps_its_newest_sound_one(catalog, prune):
    for step in (1, 2, 3, 4):
        damaged = write(catalog, step)
    damaged.write_bytes(b"damaged")
    write(catalog, 5, commit=False)
    done, said = prune(3600)
    assert done == 0
    assert "deleted step 1, step 4, step 5 of run" in said
    assert catalog.steps() == [3, 2]  # the recipe keeps two


@pytest.mark.parametrize(
    ("seconds_ago", "code", "reason"),
    [(2, None, "is training (a rank gave a sign of life"), (None, None, "cannot be known here")],
)
def test_prune_leaves_a_run_alone_that_trains_or_may_train(
    catalog, prune, seconds_ago, code, reason
):
    write(catalog, 4, commit=False)
    write(catalog, 3)
    done, said = prune(seconds_ago, code)
    assert done == 2 and reason in said
    assert catalog.steps() == [4, 3]


def test_prune_may_follow_at_once_when_all_ranks_have_ended(catalog, prune):
    write(catalog, 4, commit=False)
    write(catalog, 3)
    assert prune(0, code=0)[0] == 0
    assert catalog.steps() == [3]


def test_prune_deletes_nothing_where_nothing_is_sound(catalog, prune):
    write(catalog, 1).write_bytes(b"damaged")
    done, said = prune(3600)
    assert done == 2 and "no sound checkpoint; nothing deleted" in said
    assert catalog.steps() == [1]
