"""Damage data sets and checkpoints at random, and see that nothing wrong is ever taken for right.

    python tests/faults/fuzz.py --count 200 --seed 1

Each round copies a sound folder, damages one file, and reads it as training and resuming do. What
is read must be what was written, or the error must be one line that names a file and a remedy. No
file outside of the folder is opened, and nothing is unpickled: Python's audit events say so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from haloformer.configs.load import config_hash
from haloformer.data_pipeline.annotated import Annotated
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.index import INDEX_NAME, Content, load_index
from haloformer.data_pipeline.reader import ShardReader, verify
from haloformer.data_pipeline.shards import DatasetWriter
from haloformer.data_pipeline.tokenizers import ByteTokenizer
from haloformer.launcher.catalog import MANIFEST, Catalog, folder_of
from haloformer.launcher.manifest import LayoutRecord, Manifest, describe_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of all tests

from layouts import Case, tiny_config

Damage = Callable[[Path, Path, random.Random], None]
STEPS = (1, 2, 3)
HOSTILE = ("../outside", "/etc/hostname", "..", "a/../../outside", "shard-000000.tar\n", "")


def flip_bit(path: Path, _: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, _: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lose(path: Path, _: Path, draw: random.Random) -> None:
    path.unlink()


def grow(path: Path, _: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 2000)))


def take_another(path: Path, _: Path, draw: random.Random) -> None:
    """A file of the same kind under this one's name."""
    others = [x for x in path.parent.glob(f"*{path.suffix}") if x != path]
    if others:
        shutil.copyfile(draw.choice(sorted(others)), path)
    else:
        lose(path, path, draw)


def take_older(path: Path, older: Path, draw: random.Random) -> None:
    """The file of this name that an older generation had."""
    if older.exists():
        shutil.copyfile(older, path)
    else:
        lose(path, older, draw)


def be_hostile(path: Path, _: Path, draw: random.Random) -> None:
    """Name a file outside of the folder in the index or manifest, with every hash made right."""
    content = json.loads(path.read_text())
    name = draw.choice(HOSTILE)
    if path.name == MANIFEST:
        content["files"][draw.randrange(len(content["files"]))]["name"] = name
        separators: tuple[str, str] | None = (",", ":")
    else:
        content["shards"][draw.randrange(len(content["shards"]))]["name"] = name
        separators = None
    content.pop("sha256")
    canonical = json.dumps(content, sort_keys=True, separators=separators)
    content["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))


DAMAGES: tuple[Damage, ...] = (flip_bit, cut, lose, grow, take_another, take_older, be_hostile)


class Watch:
    """What Python opens and unpickles while something is read."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.faults: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event == "pickle.find_class":
            self.faults.append(f"{arguments} was unpickled")
        if event == "open" and isinstance(arguments[0], str | bytes | Path):
            name = arguments[0].decode() if isinstance(arguments[0], bytes) else str(arguments[0])
            path = Path(name).resolve()
            system = (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), Path("/proc"))
            source = Path(__file__).resolve().parents[2]
            if not any(path.is_relative_to(x) for x in (self.folder, *system, source)):
                self.faults.append(f"{path} was opened, outside of {self.folder}")

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch while ``folder`` is read."""
        self.folder, self.faults = folder.resolve(), []
        try:
            yield
        finally:
            self.folder = None
        assert not self.faults, self.faults


class Shards:
    """A data set of 20 documents in shards, and an older one of the same names."""

    content: ClassVar[Content] = "documents"

    def __init__(self, home: Path) -> None:
        self.sound, self.older = home / self.content, home / f"older_{self.content}"
        for folder, seed in ((self.sound, 1), (self.older, 2)):
            folder.mkdir()
            letters = np.random.default_rng(seed)
            with DatasetWriter(folder, ByteTokenizer(), 300, self.content) as writer:
                for number in range(20):
                    text = letters.integers(97, 123, 20 + 10 * number, np.uint8).tobytes().decode()
                    self._add(writer, text, number)
                writer.close()
        self.truth = self._read(self.sound)

    def _add(self, writer: DatasetWriter, text: str, number: int) -> None:
        writer.add(text, ByteTokenizer().encode(text), f"document {number}")

    def _read_sample(self, reader: ShardReader, shard: int, sample: int, length: int) -> object:
        return reader.read(shard, sample, 0, length).tobytes()

    def _read(self, folder: Path) -> list[object]:
        index = load_index(folder)
        index.load_tokenizer()
        reader = ShardReader(index)
        try:
            return [
                self._read_sample(reader, shard, sample, int(length))
                for shard in range(len(index.shards))
                for sample, length in enumerate(reader.lengths(shard))
            ]
        finally:
            reader.close()

    def damage(self, folder: Path, damage: Damage, draw: random.Random) -> None:
        files = [x for x in sorted(folder.rglob("*")) if x.is_file() and x.stat().st_size]
        path = folder / INDEX_NAME if damage is be_hostile else draw.choice(files)
        damage(path, self.older / path.relative_to(folder), draw)

    def check(self, folder: Path) -> str:
        """Read it all, then verify it: "refused", or "sound" where nothing that counts changed."""
        faults = []
        try:
            read = self._read(folder)
        except DataError as error:
            faults.append(_is_helpful(error, folder))
        else:
            # An older data set taken over whole is sound, and has another name (its hash).
            assert read == self.truth, "other tokens were read without a word"
        try:
            verify(folder)
        except DataError as error:
            faults.append(_is_helpful(error, folder))
        return "refused" if faults else "sound"


class Examples(Shards):
    """The same of questions, whose answers are stored beside the text."""

    content = "questions"

    def _add(self, writer: DatasetWriter, text: str, number: int) -> None:
        example = Annotated(("who?", text), {"id": str(number), "answers": [text[:3]]})
        segments = [ByteTokenizer().encode(part) for part in example.segments]
        writer.add_example(example, segments, [[0, 2, 0]], f"question {number}")

    def _read_sample(self, reader: ShardReader, shard: int, sample: int, length: int) -> object:
        tokens = super()._read_sample(reader, shard, sample, length)
        return tokens, reader.note(shard, sample)


class Checkpoints:
    """A run with three committed checkpoints of two files each."""

    def __init__(self, home: Path, client: MlflowClient) -> None:
        self.client, self.home = client, home
        experiment = client.create_experiment("fuzz", artifact_location=str(home / "sound"))
        self.run_id = client.create_run(experiment).info.run_id
        catalog = Catalog(client, self.run_id)
        root = catalog.artifacts.local_path("checkpoints")
        assert root is not None
        self.sound = root
        for step in STEPS:
            self._write(catalog, step)
        self.truth = {
            path.relative_to(root): path.read_bytes() for path in root.rglob("*.safetensors")
        }
        assert len(self.truth) == 2 * len(STEPS)

    def _write(self, catalog: Catalog, step: int) -> None:
        folder = self.sound / f"step-{step:08d}" / "data-0123456789abcdef"
        folder.mkdir(parents=True)
        for part in (1, 2):
            weights = {f"w{part}": torch.full((50,), float(step))}
            save_file(weights, folder / f"shard-0000{part}.safetensors")
        config = tiny_config(Case(1, 1, 0))
        manifest = Manifest(
            format=1,
            step=step,
            config=config.model_dump(mode="json"),
            config_hash=config_hash(config),
            layout=LayoutRecord(data=1, context=1, tensor=1, zero_stage=0, precision="fp32"),
            state={"data": {}},
            files=[
                describe_file(path, f"{folder.name}/{path.name}")
                for path in sorted(folder.glob("shard-*.safetensors"))
            ],
        )
        catalog.artifacts.write_text(f"{folder_of(step)}/{MANIFEST}", manifest.to_text())

    def damage(self, folder: Path, damage: Damage, draw: random.Random) -> None:
        files = [x for x in sorted(folder.rglob("*")) if x.is_file() and x.stat().st_size]
        manifests = [x for x in files if x.name == MANIFEST]
        path = draw.choice(manifests if damage is be_hostile else files)
        step = int(path.relative_to(folder).parts[0].removeprefix("step-"))
        older = folder / f"step-{step - 1:08d}" / Path(*path.relative_to(folder).parts[1:])
        damage(path, older, draw)

    def check(self, folder: Path) -> str:
        """Choose what to resume from, as `train --resume` does."""
        swapped = self.sound.with_name("swapped")
        self.sound.rename(swapped)
        folder.rename(self.sound)  # the run's artifacts are where MLflow says they are
        words = _Words()
        logging.getLogger("haloformer").addHandler(words)
        try:
            manifest = Catalog(self.client, self.run_id).newest_valid()
            assert manifest is not None, "one damage cost every checkpoint"
            for entry in manifest.files:
                path = Path(f"step-{manifest.step:08d}", entry.name)
                assert (self.sound / path).read_bytes() == self.truth[path], f"{path} is another"
        finally:
            logging.getLogger("haloformer").removeHandler(words)
            self.sound.rename(folder)
            swapped.rename(self.sound)
        if manifest.step == STEPS[-1]:
            return "sound"
        lost = folder / f"step-{STEPS[-1]:08d}" / MANIFEST
        assert words.lines or not lost.exists(), "a checkpoint was passed over without a word"
        return "refused"


class _Words(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _is_helpful(error: DataError, folder: Path) -> str:
    line = str(error)
    assert "\n" not in line and str(folder) in line, f"no file in: {line}"
    return line


def fuzz(count: int, seed: int, say: Callable[[str], None]) -> Counter[tuple[str, str, str]]:
    """Damage and read ``count`` data sets of each content and ``count`` checkpoint folders.

    Returns:
        How often each (kind, damage, outcome) came up.

    Raises:
        AssertionError: Naming the seed, the damage and what went wrong.
    """
    seen: Counter[tuple[str, str, str]] = Counter()
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        (home / "outside").write_text("not for reading")
        client = MlflowClient(f"sqlite:///{home}/mlflow.db")
        subjects: dict[str, Shards | Checkpoints] = {
            "shards": Shards(home),
            "examples": Examples(home),
            "checkpoint": Checkpoints(home, client),
        }
        for kind, subject in subjects.items():
            for number in range(count):
                draw = random.Random(f"{seed} {kind} {number}")
                damage = DAMAGES[number % len(DAMAGES)]
                folder = home / "damaged" / kind
                shutil.copytree(subject.sound, folder)
                subject.damage(folder, damage, draw)
                try:
                    # MLflow's database is beside the folders.
                    with watch.over(home if kind == "checkpoint" else folder):
                        outcome = subject.check(folder)
                except Exception as error:
                    raise AssertionError(
                        f"seed {seed}, {kind} {number}, {damage.__name__}: {error!r}"
                    ) from error
                seen[kind, damage.__name__, outcome] += 1
                shutil.rmtree(folder)
            say(f"{kind}: {count} damaged, none taken for what it is not")
    return seen


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="damages of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("haloformer").propagate = False
    for key, times in sorted(fuzz(arguments.count, arguments.seed, print).items()):
        print(f"{' '.join(key)}: {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
