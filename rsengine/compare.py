"""``python -m rsengine.compare RUN RUN …``: one page about several runs."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from rsengine.errors import run_command
from rsengine.output import escaped, parsed, program
from rsengine.run.files import write_atomically
from rsengine.run.page_compare import comparison, described, grouped, read_runs, warnings


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=program("compare"),
        description="Write a page about several runs: curves in one plot, results with intervals over seeds, and what "
        "differs between the recipes.",
        epilog="example: %(prog)s runs/a runs/b --out compare.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--out", default=Path("compare.html"), type=Path, help="the page (default: compare.html)")
    arguments = parsed(parser, argv)
    return run_command(lambda: _compare(arguments))


def _compare(arguments: argparse.Namespace) -> int:
    runs = read_runs(arguments.runs)
    groups = grouped(runs)
    write_atomically(arguments.out, comparison(runs))
    for group in groups:
        words = f"{group.name}  {escaped(described(group, groups))}: "
        if not group.seeds:
            print(f"{words}no finished run")
            continue
        words += f"{statistics.fmean(group.seeds):.2%}, n = {len(group.seeds)}"
        if group.interval:
            words += f", 95% interval {group.interval[0]:.2%} to {group.interval[1]:.2%}"
        print(words + ", no spread between the seeds" * (group.spread == 0))
    for head, words in warnings(runs):
        print(f"{head.lower()}: {escaped(words.removesuffix('.'))}")
    print(f"wrote {escaped(arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
