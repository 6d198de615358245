"""A checkpoint written by hand, without ranks."""

import os
from pathlib import Path

from haloformer.launcher.manifest import FORMAT, LayoutRecord, Manifest, describe_file


def write_checkpoint(artifacts: Path, step: int) -> None:
    """Commit a checkpoint of one file, ``part.safetensors``, of random bytes."""
    folder = artifacts / "checkpoints" / f"step-{step:08d}"
    payload = folder / f"data-{step:016x}" / "part.safetensors"
    payload.parent.mkdir(parents=True)
    payload.write_bytes(os.urandom(100))
    manifest = Manifest(
        format=FORMAT,
        step=step,
        config={},
        config_hash="",
        layout=LayoutRecord(data=1, context=1, tensor=1, zero_stage=1, precision="fp32"),
        state={},
        files=[describe_file(payload, f"{payload.parent.name}/{payload.name}")],
    )
    (folder / "manifest.json").write_text(manifest.to_text())
