"""Fixtures for the tests of rsengine.data."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import Dataset, convert
from rsengine.data.beton.reader import BetonReader


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RSENGINE_DATA", raising=False)


Converted = tuple[Dataset, dict[str, list[np.ndarray]], dict[str, list[int]]]


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Converted]:
    """convert() into a new folder; returns the data set, and images and labels of either split read without FFCV."""

    def run(source: str | Path, **options: object) -> Converted:
        options.setdefault("log", lambda line: None)
        dataset = convert(source, tmp_path / "converted", **options)  # type: ignore[arg-type]
        readers = {"train": BetonReader(dataset.train_beton), "test": BetonReader(dataset.test_beton)}
        images = {name: [reader.image(i).copy() for i in range(len(reader))] for name, reader in readers.items()}
        return dataset, images, {name: reader.labels.tolist() for name, reader in readers.items()}

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a mebibyte, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)
