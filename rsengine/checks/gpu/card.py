"""What the card is, and how fast it copies and multiplies: what every other figure is held against."""

from __future__ import annotations

from typing import Any

from rsengine.checks.gpu.device import Setup
from rsengine.kernels import explain
from rsengine.kernels.dispatch import NATIVE_OPS, OPS


def measure(row: str, setup: Setup) -> dict[str, Any]:
    return {"device": setup.device.describe(), "choices": [explain(op) for op in OPS + NATIVE_OPS], "wrong": []}
