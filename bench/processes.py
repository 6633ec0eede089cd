"""`python -m bench.processes`: one process with a thread for each core beside as many processes of one thread.

Of each network the same steps run in turn (A B C ... A B C ...), so that what slows the machine slows them alike, and
ratios are taken within a round. Writes bench/results/processes.md. About seven minutes on two cores where nothing else
runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from bench.baselines import Case, recipe_of
from bench.markdown import write_section
from bench.process_group import Group, Network, Timing, last_reductions
from rsengine.config import load_recipe
from rsengine.run.machine import machine, versions

RESULTS = Path(__file__).parent / "results" / "processes.md"
TITLE = "# One process beside several"
HEADING, ACCURACY = "## Images a second", "## Accuracy"
ALONE, SHARED, SOCKETS = "one process", "several processes", "several processes, by sockets"
ROUNDS = 9


def networks() -> list[Network]:
    stem, small = {"stem_width": 32, "stem_stride": 2}, {"stem_width": 32, "stem_stride": 1}
    cases = [
        (Case(50, **stem, size=32, batch=128), 8),
        (Case(50, **stem, size=32, batch=512), 3),
        (Case(26, **small, size=32, batch=128), 4),
    ]
    found = [Network(str(case), recipe_of(case), case.size, steps) for case, steps in cases]
    speedrun = load_recipe("speedrun")
    return found + [
        Network(f"speedrun, {side}x{side}, batch {speedrun.train.batch_size}", speedrun, side, steps)
        for side, steps in ((16, 4), (32, 2))
    ]


@dataclass
class Measured:
    """Timings of a network: by way, a list of a round's timings by rank."""

    network: Network
    rounds: dict[str, list[list[Timing]]] = field(default_factory=dict)

    def seconds(self, way: str) -> list[float]:
        """Of a step, in each round: those of the slowest process."""
        return [max(timing.seconds for timing in timings) for timings in self.rounds[way]]

    def images(self, way: str) -> float:
        return self.network.batch / statistics.median(self.seconds(way))

    def faster(self, way: str) -> tuple[float, float, float]:
        """How many times faster than one process: the quartiles over the rounds."""
        pairs = zip(self.seconds(ALONE), self.seconds(way), strict=True)
        low, middle, high = statistics.quantiles([alone / several for alone, several in pairs], n=4)
        return low, middle, high

    def reduction(self, way: str) -> tuple[float, float]:
        """Of the all-reduces: the median seconds without waiting for others, and the mean seconds with it."""
        alone = [each for timings in self.rounds[way] for each in last_reductions(timings)]
        whole = [each for timings in self.rounds[way] for timing in timings for each in timing.reductions]
        return statistics.median(alone), statistics.mean(whole)


def measure(chosen: list[Network], rounds: int, processes: int) -> list[Measured]:
    found = []
    with contextlib.ExitStack() as stack:
        groups = {ALONE: Group(1), SHARED: Group(processes), SOCKETS: Group(processes, sockets=True)}
        for group in groups.values():
            stack.enter_context(contextlib.closing(group))
        progress = stack.enter_context(tqdm(total=len(chosen) * (rounds + 1), desc="processes", unit="round"))
        for network in chosen:
            measured = Measured(network, {way: [] for way in groups})
            for group in groups.values():
                group.prepare(network)
            progress.update()
            for _ in range(rounds):
                for way, group in groups.items():
                    measured.rounds[way].append(group.run(network.steps))
                progress.update()
            found.append(measured)
    return found


def text(found: list[Measured], rounds: int, processes: int, load: float) -> str:
    """The section of the results. ``load``: the machine's load average before anything was measured."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    threads = f"{processes} thread{'s' * (processes != 1)}"
    lines = [
        HEADING,
        "",
        f"`python -m bench.processes`: {machine()['processor']}, {processes} cores; {packages}; load average "
        f"{load:.1f} at the start.",
        "",
        f"The same steps in one process of {threads} and in {processes} processes of 1 thread, each bound to a core; "
        "batches are of all processes together, batch norm is `local`. Images/s are medians of "
        f"{rounds} rounds in turn; *faster* is the median of the ratios to one process within a round, with their "
        "quartiles. Gradients are summed in shared memory, or *by sockets* as gloo does it by itself. The all-reduce's "
        "time is that of the process that came to it last; beside it, the mean over the processes with their waiting.",
        "",
        "| network | one process | several | faster | by sockets: faster | all-reduce, MB | ms | with waiting | "
        "by sockets, ms |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for each in found:
        moved = each.rounds[SHARED][0][0].nbytes / 1e6
        own, whole = (1e3 * value for value in each.reduction(SHARED))
        sent = 1e3 * each.reduction(SOCKETS)[0]
        cells = [each.network.name, f"{each.images(ALONE):,.1f}", f"{each.images(SHARED):,.1f}"]
        cells += [_spread(each.faster(SHARED)), _spread(each.faster(SOCKETS))]
        cells += [f"{moved:.1f}", f"{own:.1f}", f"{whole:.1f}", f"{sent:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(quartiles: tuple[float, float, float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def write(section: str, heading: str, until: str | None = None, results: Path = RESULTS) -> None:
    """Put a section into the results, which begin here where there are none."""
    if not results.exists():
        results.write_text(f"{TITLE}\n", encoding="utf-8")
    write_section(results, heading, section, until)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="at least 2 (default %(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="only networks whose name has this; prints, and writes nothing")
    parser.add_argument("--print", action="store_true", help="print the table, and write nothing")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: expected at least 2, for quartiles")
    chosen = [network for network in networks() if options.only is None or options.only in network.name]
    load, processes = os.getloadavg()[0], torch.get_num_threads()
    section = text(measure(chosen, options.rounds, processes), options.rounds, processes, load)
    print(section)
    if not options.print and options.only is None:
        write(section, HEADING, until=ACCURACY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
