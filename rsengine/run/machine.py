"""The machine that a run uses, and the versions of the packages that its numbers depend on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

from rsengine.processor import listing, usable_cpus

_PACKAGES = ("torch", "torchvision", "triton", "ffcv", "numba", "numpy", "rsengine")


def machine() -> dict[str, Any]:
    """The machine, without anything that identifies the host or its user.

    Returns:
        ``processor`` (model name), ``physical_cores`` (None if unknown) and ``logical_cores``
        (both: those this process may use), ``ram_gib`` (float, or None), ``gpus`` (list of names), ``os``, ``python``.
        GPUs are listed only when torch has already been imported: this function never imports it.
    """
    cpus = usable_cpus()
    model, physical = _processor(cpus)
    return {
        "processor": model,
        "physical_cores": physical,
        "logical_cores": len(cpus),
        "ram_gib": _ram_gib(),
        "gpus": _gpus(),
        "os": _system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def versions() -> dict[str, str | None]:
    """Installed version of each package that a run's numbers depend on; None for one that is not installed.

    Read from package metadata: nothing is imported.
    """
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _processor(cpus: set[int]) -> tuple[str, int | None]:
    """Model name, and the physical cores behind the logical ``cpus``."""
    name = platform.processor() or platform.machine()
    cores = set()
    for fields in listing():
        name = fields.get("model name") or name
        if fields.get("processor", "").isdigit() and int(fields["processor"]) in cpus and "core id" in fields:
            cores.add((fields.get("physical id"), fields["core id"]))
    return name, len(cores) or None


def _ram_gib() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _system() -> str:
    name = f"{platform.system()} {platform.release()}"
    if platform.system() == "Linux":
        with contextlib.suppress(OSError):  # a Linux without /etc/os-release: the kernel's name is what there is
            name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    return f"{name}, {platform.machine()}"
