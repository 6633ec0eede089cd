"""What is wrong with a step, and which of its lines causes it."""

from __future__ import annotations

import linecache
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

CHECKS = Path(__file__).resolve().parent
LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"))
OWN = tuple(str(CHECKS / name) for name in ("findings.py", "trace.py", "fake_device.py"))
DRIVER = str(CHECKS / "capture.py")
# What each finding is called, and what to do about it.
SYNCHRONISATION = "host synchronisation"
COPY = "copy between host and device"
HOST_TENSOR = "tensor on the host"
LEAK = "allocation that outlives the step"
SEQUENCE = "changing sequence of operations"
ADDRESS = "changing address"
NUMBER = "changing Python number"
FAILURE = "failure"
REMEDIES = {
    SYNCHRONISATION: "keep the decision on the device: torch.where, masks, static shapes",
    COPY: "make the tensor on the device before the first step",
    HOST_TENSOR: "a replay would repeat its present value: use a Python number if it is constant, else a device tensor",
    LEAK: "make what is kept before the first step and change it in place",
    SEQUENCE: "no branch in the step may depend on what changes from step to step",
    ADDRESS: "change the tensor in place (copy_, zero_) so that a replay finds it where the capture did",
    NUMBER: "a replay would repeat it: read it from a table on the device by the step counter",
    FAILURE: "the step has to run on any device",
}


class Site(NamedTuple):
    """A line of the program."""

    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        path = Path(self.file)
        for base in (CHECKS.parents[1], Path.cwd()):
            if path.is_relative_to(base):
                return f"{path.relative_to(base)}:{self.line}"
        return f"{path}:{self.line}"


@dataclass(frozen=True)
class Finding:
    """One reason why a replay would not do what the step does."""

    kind: str
    operation: str
    site: Site | None
    detail: str
    forward: Site | None = None

    def __str__(self) -> str:
        where = f"{self.site}: `{self.site.text}`" if self.site else "outside the step's own lines"
        if self.forward not in (None, self.site):
            where += f" (the gradient of {self.forward}: `{self.forward.text}`)"
        return f"{self.kind}: {self.operation} at {where}\n    {self.detail}; {REMEDIES[self.kind]}"


def innermost_site(frame: Any) -> Site | None:
    """The innermost line on the stack that is neither PyTorch's nor Python's, down to whoever runs the check."""
    while frame is not None and frame.f_code.co_filename != DRIVER:
        if is_of_the_step(frame.f_code.co_filename):
            return Site(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return None


def origin(error: BaseException) -> Site | None:
    """The innermost line of the step through which an error came."""
    site, traceback = None, error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_of_the_step(code.co_filename):
            site = Site(code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
    return site


@lru_cache(maxsize=4096)
def is_of_the_step(file: str) -> bool:
    torch_folder, standard = LIBRARIES
    if file.startswith(("<", torch_folder)) or file in (*OWN, DRIVER):
        return False
    return not file.startswith(standard) or "-packages" in file
