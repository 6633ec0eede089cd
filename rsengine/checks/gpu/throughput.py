"""Images per second of every way to run a step, in turn; host time, idle share, kernels per step."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable
from typing import Any

from rsengine.checks.gpu.device import Setup, idle_share, split_rounds, time_in_turn
from rsengine.checks.gpu.steps import Way

CAPTURED = Way("captured", graph=True)
WAYS = (
    Way("plain"),
    Way("plain, cudnn.benchmark", benchmark=True),
    CAPTURED,
    Way("captured, cudnn.benchmark", graph=True, benchmark=True),
    Way("captured, products", graph=True, benchmark=True, products=True),
    Way("captured, resident", graph=True, resident=True),
)
COMPILED = (CAPTURED, Way("compiled", compile=True), Way("captured, compiled", graph=True, compile=True))


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"batch N"`` or ``"compiled, batch N"``."""
    recipe = setup.recipe(f"train.batch_size={row.rpartition(' ')[2]}")
    ways: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for way in COMPILED if row.startswith("compiled") else WAYS:
        if way.graph and not setup.device.is_gpu:
            ways[way.name] = {"left_out": "a CPU captures no CUDA graph"}
            continue
        try:
            runs[way.name], ways[way.name] = way.prepare(recipe, setup.device), {}
        except Exception as error:  # one way that fails must not hide the others: it is reported
            traceback.print_exc()
            ways[way.name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    for name, times in time_in_turn(setup.device, runs, setup.rounds, setup.round_steps).items():
        seconds = [total for total, _ in times]
        ways[name] |= {
            "images_per_second": recipe.train.batch_size / statistics.median(seconds),
            "step_ms": statistics.median(seconds) * 1e3,
            "step_ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
            "host_ms": statistics.median(host for _, host in times) * 1e3,
        }
        setup.log(f"{row}, {name}: {ways[name]['images_per_second']:,.0f} images/s")
    for name, run in runs.items():  # last: what has been profiled once may be slower to launch
        ways[name]["host_waits"] = _host_waits(setup, run)
        if setup.device.is_gpu:
            ways[name] |= _profiled(setup, run)
    wrong = [f"{name}: {way['error']}" for name, way in ways.items() if "error" in way]
    wrong += [f"{name}: the host waits ({way['host_waits']})" for name, way in ways.items() if way.get("host_waits")]
    return {
        "batch_size": recipe.train.batch_size,
        "rounds": setup.rounds,
        "round_steps": setup.round_steps,
        "ways": ways,
        "wrong": wrong,
    }


def _host_waits(setup: Setup, run: Callable[[], None]) -> str | None:
    """What makes the host wait for the device in a step, if anything does."""
    try:
        with setup.device.no_waiting():
            run()
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    return None


def _profiled(setup: Setup, run: Callable[[], None]) -> dict[str, Any]:
    rounds = setup.profiled_steps
    try:
        split = split_rounds(setup.device.profile(lambda: [run() for _ in range(rounds + 1)]), rounds)
    except RuntimeError as error:  # the times above stand without it
        return {"profile_error": str(error)[:200]}
    return {"kernels": len(split[0]), "idle_share": idle_share([work for part in split for work in part])}
