"""Compiles the kernels that the other parts launch, in as many processes as there are cores.

Triton compiles a kernel at its first launch, one after another: on an H200's machine about 0.6 s each, and a step has
some sixty. Each process here runs the same programs without launching anything and compiles its share of what they
would launch; later processes find it in Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from rsengine.checks.gpu import smoke
from rsengine.checks.gpu.device import Setup, setup_for
from rsengine.checks.gpu.steps import device_batches, make_step
from rsengine.checks.gpu.suites import MOST_PROCESSES, ROOT, die_with_this_process, end_of, last_words
from rsengine.config import Recipe, load_recipe
from rsengine.processor import usable_cpus
from rsengine.temporaries import temporary_folder


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"kernels of the steps"``."""
    return compile_shares([sys.executable, "-m", __name__], setup.seconds)


def compile_shares(command: Sequence[str], seconds: float, processes: int | None = None) -> dict[str, Any]:
    """Run ``command i/n`` for each i of n processes, for at most ``seconds``; each prints how many it compiled."""
    count = processes or min(len(usable_cpus()), MOST_PROCESSES)
    deadline, compiled, wrong = time.monotonic() + seconds, [], []
    with temporary_folder("check") as folder, contextlib.ExitStack() as stack:
        files = [folder / f"{i}.log" for i in range(count)]
        running = [
            subprocess.Popen(
                [*command, f"{i}/{count}"],
                cwd=ROOT,
                env=os.environ,
                stdout=stack.enter_context(open(file, "wb")),
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_this_process(),
            )
            for i, file in enumerate(files)
        ]
        for process, file in zip(running, files, strict=True):
            end, said = end_of(process, deadline), last_words(file.read_text(errors="replace"))
            if end:
                wrong.append(f"process {file.stem} of {count} {end}: {said}")
            else:
                compiled.append(int(said))
    return {"kernels": sum(compiled), "processes": count, "wrong": wrong}


def main(argv: Sequence[str]) -> int:
    """Compile share ``i/n`` of the kernels, and print how many those are."""
    index, count = map(int, argv[0].split("/"))
    with compiling_share(index, count) as compiled:
        run_programs(setup_for("cuda"))
    print(len(compiled))
    return 0


def run_programs(setup: Setup) -> None:
    """What the other parts run in a first call, each once: the ops of the first look, and steps."""
    for row in ("cross-entropy", "batch norm", "block epilogue", "update", "augmentation"):
        smoke.measure(row, setup)
    for recipe, bf16 in recipes(setup):
        step = make_step(recipe, setup.device, bf16=bf16)
        step(*(() if step.resident is not None else device_batches(recipe, setup.device, 1)[0]))


def recipes(setup: Setup) -> list[tuple[Recipe, bool]]:
    """Of those steps, and whether they run in bfloat16."""
    report, quickstart = (load_recipe(name).with_settings(list(setup.settings)) for name in ("report-1", "quickstart"))
    return [
        (setup.recipe(), True),
        (setup.recipe(), False),
        (setup.recipe("model.dropout=0.25", "model.drop_path=0.2"), False),  # of the masks
        (report, True),  # of the profile
        (setup.recipe("train.loader=resident"), True),
        (quickstart.with_settings(["train.loader=resident"]), True),
    ]


@contextlib.contextmanager
def compiling_share(index: int, count: int) -> Iterator[list[str]]:
    """Inside, no Triton kernel is launched; those of share ``index`` of ``count`` are compiled, and listed by name.

    What the kernels would have written stays uninitialised.
    """
    from triton.runtime.jit import JITFunction

    run, seen, compiled = JITFunction.run, set(), []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = launch_key(self.fn.__name__, args, options)
        if key not in seen and zlib.crc32(key.encode()) % count == index:
            run(self, *args, grid=grid, warmup=True, **options)  # a launch that ends at compilation
            compiled.append(self.fn.__name__)
        seen.add(key)

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def launch_key(name: str, args: Sequence[Any], options: dict[str, Any]) -> str:
    """The same in every process for launches of the same code, which depends on no address but on its alignment."""
    values = [(str(a.dtype), a.data_ptr() % 16) if isinstance(a, Tensor) else repr(a) for a in args]
    return repr((name, values, sorted((option, repr(value)) for option, value in options.items())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
