"""`python -m bench.beside_other_work`: training steps alone, and beside a process that keeps one processor busy.

For each way in which OpenMP's threads can wait for each other: OpenMP's default, rsengine's, and sleeping at once. Each
has a process of its own; they take turns, and each measures alone and beside, when it has had time to notice. The
table of docs/performance.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench.baselines import Case
from bench.own_process import OURS, OwnProcess
from rsengine.processor import LOOKS
from rsengine.waiting import CALM, PERIOD

CASES = [Case(26, 32, 1, 32, 128), Case(50, 32, 2, 32, 128)]
WAYS = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": None},
    "rsengine's": {"GOMP_SPINCOUNT": str(LOOKS), "OMP_WAIT_POLICY": None},
    "OMP_WAIT_POLICY=passive": {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "passive"},
}
ROUNDS, SECONDS = 5, 3.0
NOTICED, FORGOTTEN = 3 * PERIOD, (CALM + 2) * PERIOD  # seconds


def work(process: OwnProcess, seconds: float) -> list[float]:
    """The times of the steps of about so many seconds."""
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        times.append(process.step())
    return times


def rate(process: OwnProcess, images: int) -> float:
    times = work(process, SECONDS)
    return images * len(times) / sum(times)


def main() -> None:
    print("| step | threads wait by | alone, images/s | beside a busy process | share |\n|---|---|---:|---:|---:|")
    for case in CASES:
        processes = {name: OwnProcess(OURS, case, way, watches=True) for name, way in WAYS.items()}
        for process in processes.values():
            process.step(), process.step()
        alone, beside = ({name: [] for name in WAYS} for _ in range(2))
        for _ in range(ROUNDS):
            for name, process in processes.items():
                work(process, FORGOTTEN)  # the others' turns, too, are other work
                alone[name].append(rate(process, case.batch))
                with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
                    try:
                        work(process, NOTICED)
                        beside[name].append(rate(process, case.batch))
                    finally:
                        busy.kill()
        for name, process in processes.items():
            first, second = statistics.median(alone[name]), statistics.median(beside[name])
            print(f"| {case} | {name} | {first:.0f} | {second:.0f} | {second / first:.2f} |", flush=True)
            process.close()


if __name__ == "__main__":
    main()
