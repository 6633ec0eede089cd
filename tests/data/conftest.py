"""Fixtures for the tests of rsengine.data."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import Dataset, convert
from rsengine.data.beton.reader import BetonReader


@pytest.fixture(scope="session", autouse=True)
def _ffcv_imported_once() -> Iterator[None]:
    """Import FFCV here, so that each forked writer need not: that takes seconds. It reduces torch and numba to one
    thread, which other tests must not see. Its main loop sleeps a tenth of a second twice a file; here less."""
    import numba
    import torch

    threads = torch.get_num_threads(), numba.get_num_threads()
    import ffcv.writer
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert IMAGE_MODES["raw"] == 1 and IMAGE_MODES["jpg"] == 0
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])
    patch = pytest.MonkeyPatch()
    patch.setattr(ffcv.writer, "sleep", lambda seconds: time.sleep(seconds / 20))
    yield
    patch.undo()


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
