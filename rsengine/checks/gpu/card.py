"""The card, and the rates of a copy and of a matrix product, with which every other figure is compared."""

from __future__ import annotations

from typing import Any

from rsengine.checks.gpu.device import Setup
from rsengine.kernels import explain
from rsengine.kernels.dispatch import NATIVE_OPS, OPS, UPDATE_OPS


def measure(row: str, setup: Setup) -> dict[str, Any]:
    choices = [explain(op) for op in OPS + UPDATE_OPS + NATIVE_OPS]
    return {"device": setup.device.describe(), "choices": choices, "wrong": []}
