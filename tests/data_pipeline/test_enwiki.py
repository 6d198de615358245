from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from haloformer.data_pipeline.enwiki import FILE_NAME, extract_slice, fetch_enwiki
from haloformer.data_pipeline.errors import DataError
from haloformer.data_pipeline.sources import find_inputs, iter_documents


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "gensim.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../evil", b"x")
    with pytest.raises(DataError, match=r"gensim.whl: sha256 is not 91a7fa5e"):
        extract_slice(wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_an_unreachable_package_index_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip could not download gensim==4.4.0 \(ERROR") as caught:
        fetch_enwiki(tmp_path / "raw")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "raw" / FILE_NAME).exists()


@pytest.mark.extended
def test_the_slice_is_fetched_once_and_holds_106_articles(tmp_path: Path, monkeypatch) -> None:
    path = fetch_enwiki(tmp_path)
    assert sum(1 for _ in iter_documents(find_inputs([path], "mediawiki"), "mediawiki")) == 106
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert fetch_enwiki(tmp_path) == path
    path.write_bytes(b"damaged")
    with pytest.raises(DataError):
        fetch_enwiki(tmp_path)
