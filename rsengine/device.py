"""Where a run computes and in which precision, and why. The only place in this room that asks the machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Execution:
    """The device, the autocast dtype (``None``: float32 throughout), the threads, and a sentence on the choice."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    threads: int
    reason: str

    @property
    def precision(self) -> str:
        return "fp32" if self.autocast_dtype is None else "bf16"

    def autocast(self, cache: bool = True) -> torch.autocast:
        """Autocast in this precision. ``cache=False`` for graph capture, which a kept copy of a weight would break."""
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
            cache_enabled=cache,
        )


def choose_execution(device: str = "auto", precision: str = "auto") -> Execution:
    """Settle ``device`` (auto, cpu, cuda) and ``precision`` (auto, bf16, fp32) for this machine.

    Raises:
        ValueError: ``cuda`` on a machine without one, with what to use instead.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: this machine has no usable CUDA GPU; use --device cpu or --device auto")
    kind = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
    native, why = _native_bf16(kind)
    use_bf16 = precision == "bf16" or (precision == "auto" and native)
    asked = "as asked" if precision != "auto" else "automatic"
    return Execution(
        device=torch.device(kind),
        autocast_dtype=torch.bfloat16 if use_bf16 else None,
        threads=torch.get_num_threads(),
        reason=f"{'bfloat16 autocast' if use_bf16 else 'float32'} on {kind} ({asked}: {why})",
    )


@contextlib.contextmanager
def preserved_threads() -> Iterator[None]:
    """Put torch's thread count back afterwards: importing FFCV sets it to 1, building a loader to its workers."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _native_bf16(kind: str) -> tuple[bool, str]:
    if kind == "cuda":
        capability = torch.cuda.get_device_capability()
        native = capability >= (8, 0)
        return native, f"{torch.cuda.get_device_name()} {'has' if native else 'lacks'} bfloat16 matrix units"
    flags = _processor_flags()
    found = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    if found:
        return True, f"the processor has {', '.join(found).upper()}"
    return False, "the processor has neither AVX512_BF16 nor AMX"


def _processor_flags() -> set[str]:
    """x86 `flags` or Arm `Features` of the first processor; empty where the system does not say."""
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(value.split())
    return set()
