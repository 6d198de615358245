"""Files of a checkpoint that are fetched once for all ranks of a host."""

import shutil
import time
from pathlib import Path

from dist import run_ranks
from haloformer.launcher.artifacts import ArtifactFolder
from haloformer.launcher.checkpoint import CheckpointStore
from haloformer.launcher.topology import Layout, build_topology
from layouts import Case, tiny_config
from written_checkpoint import write_checkpoint


class Elsewhere(ArtifactFolder):
    """A folder whose files have to be fetched, as those behind a server."""

    def local_path(self, name: str) -> None:
        return None

    def fetch(self, name: str, folder: Path) -> Path:
        return Path(shutil.copy(Path(self.uri, name), folder))


def read_slowly(rank: int, world_size: int, folder: str) -> bool:
    place = Elsewhere(f"{folder}/artifacts", f"sqlite:///{folder}/mlflow.db")
    topology = build_topology(Layout(data=2, context=1))
    staging = Path(folder, "staging")
    store = CheckpointStore(place, "run", tiny_config(Case(2, 1, 1)), staging, topology)
    with store._on_this_host(store.catalog.find(8)) as files:
        time.sleep(rank)
        there = (files / "part.safetensors").is_file()
    assert rank != 0 or not files.exists()
    return there


def test_the_files_stay_until_the_slowest_rank_of_the_host_has_read_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "artifacts", 8)
    assert run_ranks(2, read_slowly, str(tmp_path)) == [True, True]
