"""What is shipped: one top-level package, with its recipes, from the tree and from the sdist."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import haloformer
from doc_pages import ROOT

LIMIT_S = 120.0
FOLDERS = ("configs", "data_pipeline", "kernels", "launcher", "model")


def tree(target: Path) -> Path:
    """A copy of what git knows: building writes beside the sources."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def build(kind: str, source: Path, target: Path) -> Path:
    """Build by setuptools as pip would, without a network."""
    target.mkdir()
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(target)!r})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", tree(folder / "tree"), folder / "dist")


def names_in(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_the_wheel_owns_the_package_haloformer_and_no_other(wheel):
    tops = {name.partition("/")[0] for name in names_in(wheel)}
    assert tops == {"haloformer", f"haloformer-{haloformer.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_recipe_and_nothing_else(wheel):
    expected = {"haloformer/__init__.py", "haloformer/py.typed"}
    for folder in FOLDERS:
        for ending in ("*.py", "*.yaml", "*.sbatch"):
            expected |= {f"haloformer/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob(ending)}
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == expected


def test_the_wheel_says_what_it_is(wheel):
    said = metadata(wheel)
    assert said["Version"] == haloformer.__version__
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "Apache-2.0" and said["License-File"] == "LICENSE"
    assert said["Description-Content-Type"] == "text/markdown"
    assert str(said.get_payload()).lstrip().startswith("# Haloformer")
    assert said.get_all("Classifier")
    assert any(name.endswith("/licenses/LICENSE") for name in names_in(wheel))


@pytest.mark.extended
def test_the_sdist_builds_the_same_wheel_and_brings_the_docs(wheel, tmp_path):
    sdist = build("sdist", tree(tmp_path / "tree"), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"haloformer-{haloformer.__version__}"
    for name in ("LICENSE", "CHANGELOG.md", "docs/README.md", "examples/op.py"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (unpacked / "tests").exists()
    again = build("wheel", unpacked, tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        content = {name: one.read(name) for name in one.namelist() if not name.endswith("RECORD")}
        assert content == {name: other.read(name) for name in content}
        assert len(one.namelist()) == len(other.namelist())
