"""The card, and the rates of a copy and of a matrix product, with which every other figure is compared."""

from __future__ import annotations

from typing import Any

from rsengine.checks.gpu.device import Setup
from rsengine.kernels import explain
from rsengine.kernels.dispatch import NATIVE_OPS, OPS


def measure(row: str, setup: Setup) -> dict[str, Any]:
    return {"device": setup.device.describe(), "choices": [explain(op) for op in OPS + NATIVE_OPS], "wrong": []}
