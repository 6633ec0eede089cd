"""`python -m bench.beside_other_work`: training steps alone, and beside a process that keeps one processor busy.

For each way in which OpenMP's threads can wait for each other: OpenMP's default, rsengine's, and sleeping at once. Each
has a process of its own; they take turns, and each measures alone and beside. The table of docs/performance.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench.baselines import Case
from bench.own_process import OURS, OwnProcess
from rsengine.processor import SPINS_ALONE, SPINS_BESIDE_OTHERS

CASES = [Case(26, 32, 1, 32, 128), Case(50, 32, 2, 32, 128)]
WAYS = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": None},
    "rsengine's, begun alone": {"GOMP_SPINCOUNT": str(SPINS_ALONE), "OMP_WAIT_POLICY": None},
    "rsengine's, begun beside others": {"GOMP_SPINCOUNT": str(SPINS_BESIDE_OTHERS), "OMP_WAIT_POLICY": None},
    "OMP_WAIT_POLICY=passive": {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "passive"},
}
ROUNDS, SECONDS = 5, 3.0


def rate(process: OwnProcess, images: int) -> float:
    """Images a second over about :data:`SECONDS`."""
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        times.append(process.step())
    return images * len(times) / sum(times)


def main() -> None:
    print("| step | threads wait by | alone, images/s | beside a busy process | share |\n|---|---|---:|---:|---:|")
    for case in CASES:
        processes = {name: OwnProcess(OURS, case, way) for name, way in WAYS.items()}
        for process in processes.values():
            process.step(), process.step()
        alone, beside = ({name: [] for name in WAYS} for _ in range(2))
        for _ in range(ROUNDS):
            for name, process in processes.items():
                alone[name].append(rate(process, case.batch))
                with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
                    beside[name].append(rate(process, case.batch))
                    busy.kill()
        for name, process in processes.items():
            first, second = statistics.median(alone[name]), statistics.median(beside[name])
            print(f"| {case} | {name} | {first:.0f} | {second:.0f} | {second / first:.2f} |", flush=True)
            process.close()


if __name__ == "__main__":
    main()
