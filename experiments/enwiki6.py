"""enwiki6: 6 MB of Wikipedia's XML as raw bytes, split 90/5/5 in order as enwik8 is.

The slice that the gensim package carries; figures on it compare with nothing that is published.
"""

from __future__ import annotations

import bz2
import subprocess
import sys
from pathlib import Path

from arms import WORK, haloformer


def fetch_dump(folder: Path) -> Path:
    """The slice that ``make train`` uses, fetched once, its sha256 checked."""
    module = "haloformer.data_pipeline.enwiki"
    subprocess.run([sys.executable, "-m", module, str(folder)], check=True)
    return folder / "enwiki-slice.xml.bz2"


def prepare_bytes() -> Path:
    """Make ``work/enwiki6/train``, ``eval`` and ``test``, each a data set of one document."""
    folder = WORK / "enwiki6"
    text = bz2.decompress(fetch_dump(folder).read_bytes()).decode()
    cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    for name, start, stop in zip(("train", "eval", "test"), cuts[:-1], cuts[1:], strict=True):
        file = folder / f"{name}.txt"
        if not file.exists():
            file.write_text(text[start:stop])
        words = ["--format", "text", "--tokenizer", "byte", "--holdout", "0", "--output", name]
        haloformer(folder, "prepare", "--input", file.name, *words)
    return folder
