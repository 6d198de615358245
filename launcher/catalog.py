"""The checkpoints of a run, as the command line sees them: no torch, no ranks.

artifacts/checkpoints/step-00000060/manifest.json
                                    data-3f.../shard-00001-model-....safetensors
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.manifest import FileEntry, Manifest, ManifestError, fault_of_file

ROOT = "checkpoints"
MANIFEST = "manifest.json"

_STEP = re.compile(r"^step-(\d{8,})$")
# fp32 weight and two moments, and what safetensors headers and the manifest may add.
_BYTES_PER_PARAMETER = 12
_OVERHEAD = 1 << 20

_log = logging.getLogger(__name__)


class Catalog:
    """Committed checkpoints of one run, newest first."""

    def __init__(self, place: MlflowClient | ArtifactFolder, run_id: str) -> None:
        """Open the artifacts of a run; a client is asked where they are."""
        self.run_id = run_id
        self.artifacts = (
            place if isinstance(place, ArtifactFolder) else ArtifactFolder.of_run(place, run_id)
        )

    def committed(self) -> list[Manifest]:
        """Checkpoints with a valid manifest, newest first; their files are not looked at."""
        manifests = [self.read(step) for step in self.steps()]
        return [manifest for manifest in manifests if manifest is not None]

    def steps(self) -> list[int]:
        """Steps with anything at all in their folder, committed or not, highest first."""
        matches = [_STEP.match(name) for name in self.artifacts.list_folder(ROOT)]
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def read(self, step: int) -> Manifest | None:
        """The manifest of a step, None if that step is not committed."""
        name = f"{folder_of(step)}/{MANIFEST}"
        try:
            manifest = Manifest.from_text(self.artifacts.read_text(name))
        except FileNotFoundError:
            return None
        except (ManifestError, UnicodeDecodeError) as error:
            _log.warning("%s of run %s is left out: %s", name, self.run_id, error)
            return None
        if manifest.step != step:
            said = manifest.step
            _log.warning("%s of run %s is left out: it says step %d", name, self.run_id, said)
            return None
        return manifest

    def find(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            ValueError: If it is not committed; names the ones that are.
        """
        manifest = self.read(step)
        if manifest is None:
            known = ", ".join(str(entry.step) for entry in self.committed())
            raise ValueError(
                f"run {self.run_id} has no committed checkpoint at step {step}; "
                f"it has {known if known else 'none'}"
            )
        return manifest

    def verify(self, manifest: Manifest) -> str | None:
        """Read every file and compare its hash: the first fault, naming the file, or None."""
        for entry in manifest.files:
            fault = self._fault(manifest.step, entry)
            if fault is not None:
                return f"{folder_of(manifest.step)}/{fault}"
        return None

    def newest_valid(self) -> Manifest | None:
        """The newest checkpoint whose files are all as written; warns about each one it passes."""
        for manifest in self.committed():
            fault = self.verify(manifest)
            if fault is None:
                return manifest
            _log.warning(
                "checkpoint step %d of run %s is damaged: %s; trying the one before",
                manifest.step,
                self.run_id,
                fault,
            )
        return None

    def remove(self, step: int) -> None:
        """Delete a checkpoint; killed half-way, what is left has no manifest."""
        folder = folder_of(step)
        self.artifacts.delete(f"{folder}/{MANIFEST}")
        self.artifacts.delete(folder)

    def prune(self, newest: Manifest, keep_last: int, keep_every: int | None) -> None:
        """Drop what is no longer wanted, now that ``newest`` is committed.

        Kept: ``newest``, the ``keep_last`` - 1 committed before it, and steps that ``keep_every``
        divides. Dropped: the rest, what was never committed, and steps after ``newest``: after
        going back to an earlier checkpoint they are of a history that did not happen.
        """
        older = [entry.step for entry in self.committed() if entry.step < newest.step]
        kept = {newest.step, *older[: keep_last - 1]}
        if keep_every is not None:
            kept |= {step for step in older if step % keep_every == 0}
        for step in self.steps():
            if step not in kept:
                self.remove(step)
        for name in self.artifacts.list_folder(folder_of(newest.step)):
            if name not in (MANIFEST, newest.folder):
                self.artifacts.delete(f"{folder_of(newest.step)}/{name}")

    def _fault(self, step: int, entry: FileEntry) -> str | None:
        name = f"{folder_of(step)}/{entry.name}"
        local = self.artifacts.local_path(name)
        if local is not None:
            return fault_of_file(entry, local)
        with tempfile.TemporaryDirectory() as folder:
            try:
                return fault_of_file(entry, self.artifacts.fetch(name, Path(folder)))
            except (MlflowException, OSError) as error:
                return f"{entry.name} cannot be fetched ({' '.join(str(error).split())[:200]})"


def folder_of(step: int) -> str:
    """Artifact folder of a step."""
    return f"{ROOT}/step-{step:08d}"


def required_bytes(num_parameters: int) -> int:
    """Size of one checkpoint of a model."""
    return num_parameters * _BYTES_PER_PARAMETER + _OVERHEAD


def check_disk(
    artifact_location: str, staging: Path, num_parameters: int, keep_last: int = 1
) -> None:
    """See that the checkpoints of a run have room, before any rank starts.

    Args:
        artifact_location: Of the experiment: a path or an URI.
        staging: Where files wait for their upload, when the location is not on this machine.
        num_parameters: Of the model.
        keep_last: Checkpoints that stay, beside the one that is being written.

    Raises:
        ValueError: Saying what is needed and what is there, or which folder cannot be written.
    """
    one = required_bytes(num_parameters)
    parsed = urlparse(artifact_location)
    if parsed.scheme in ("", "file"):
        place, copies = Path(unquote(parsed.path)).absolute(), keep_last + 1
    else:
        place, copies = staging.absolute(), 1
    for folder in (place, staging.absolute()):
        existing = _existing(folder)
        if not os.access(existing, os.W_OK):
            raise ValueError(
                f"{folder}: {existing} cannot be written; go to a folder of yours for the run, and "
                "set tracking.artifacts to another one for its checkpoints"
            )
    free = shutil.disk_usage(_existing(place)).free
    if free < copies * one:
        raise ValueError(
            f"not enough disk for checkpoints in {place}: {copies} of "
            f"{one / 2**30:.2f} GiB ({num_parameters / 1e6:.1f} M parameters x "
            f"{_BYTES_PER_PARAMETER} bytes) need {copies * one / 2**30:.2f} GiB and "
            f"{free / 2**30:.2f} GiB are free; free some, lower checkpoint.keep_last, or set "
            "tracking.artifacts to a larger disk"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the one in which it would be made."""
    return next(path for path in (folder, *folder.parents) if path.exists())
