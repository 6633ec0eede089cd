"""Where a run computes and in which precision, and why."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rsengine.errors import SettingsError
from rsengine.processor import features


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

    def autocast(self) -> torch.autocast:
        """Autocast in this precision. It keeps no casts: a pass uses each weight once, and a graph could not."""
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,
        )


def choose_execution(device: str = "auto", precision: str = "auto") -> Execution:
    """Settle ``device`` (auto, cpu, cuda) and ``precision`` (auto, bf16, fp32) for this machine.

    Raises:
        SettingsError: ``cuda`` on a machine without one, with what to use instead.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise SettingsError("--device cuda: this machine has no usable CUDA GPU; use --device cpu or --device auto")
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


def keep_freed_memory() -> bool:
    """Let the C library reuse the memory of large tensors. Returns False if it is not glibc; nothing is changed then.

    glibc maps a block of more than 32 MiB from the system and returns it when it is freed, so the kernel clears every
    page of such maps again in each step: two fifths of a step's time (``docs/performance.md``). The threshold
    (M_MMAP_THRESHOLD) cannot be higher than 32 MiB, so mapping is turned off.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; no such library; Windows
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 * 2**20))  # -1: as unsigned, never
    return all([mallopt(option, value) == 1 for option, value in settings])


@contextlib.contextmanager
def preserved_threads() -> Iterator[None]:
    """Restore torch's thread count afterwards: importing FFCV sets it to 1, a loader to the number of its workers."""
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
    found = sorted(features() & {"avx512_bf16", "amx_bf16", "bf16"})
    if found:
        return True, f"the processor has {', '.join(found).upper()}"
    return False, "the processor has neither AVX512_BF16 nor AMX"
