"""Real CIFAR-10, where RSENGINE_DATA names it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rsengine.data import load_dataset
from rsengine.data.beton.reader import BetonReader

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = os.environ.get("RSENGINE_DATA")  # read before the fixture takes it away


def test_real_cifar10(tmp_path):
    if not REAL:
        pytest.skip("RSENGINE_DATA is not set to a CIFAR-10 source")
    if (Path(REAL) / "dataset.json").is_file():
        pytest.skip(f"RSENGINE_DATA names a converted data set ({REAL}), not a source")
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "data" / "convert.py"), REAL, "--out", str(tmp_path / "cifar10")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert time.monotonic() - start < 60
    dataset = load_dataset(tmp_path / "cifar10")
    assert (dataset.train_count, dataset.test_count) == (50_000, 10_000)
    assert dataset.class_counts == {"train": (5000,) * 10, "test": (1000,) * 10}
    assert ", ".join(dataset.classes) == "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
    assert dataset.image_size == (32, 32)
    # The published statistics of CIFAR-10 to the precision that survives re-encoding as JPEG.
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=5e-4)
    np.testing.assert_allclose(dataset.std, (0.2470, 0.2435, 0.2616), atol=3e-3)
    if "jpeg" in REAL:
        assert [round(value, 4) for value in (*dataset.mean, *dataset.std)] == [
            0.4913,
            0.4821,
            0.4465,
            0.2452,
            0.2428,
            0.2606,
        ]
    reader = BetonReader(dataset.train_beton)
    assert np.bincount(reader.labels).tolist() == [5000] * 10
