"""``python -m rsengine.capture_check``: prove, on any machine, that a recipe's steps can be captured and replayed."""

from __future__ import annotations

import argparse
import sys

from rsengine.checks.capture import STEPS, check_recipe, fake_group
from rsengine.checks.launches import launch_table
from rsengine.config import load_recipe, recipe_names
from rsengine.errors import SettingsError, run_command
from rsengine.output import parsed

LARGEST = 4096  # pixels a side, or classes


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0 every step can be captured, 1 one cannot, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m rsengine.capture_check", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart", help=f"one of {', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    parser.add_argument("--image-size", type=int, default=32, metavar="N", help="pixels a side (default: 32)")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="classes of the data (default: 10)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that share a batch (default: 1)"
    )
    parser.add_argument("--launch-table", action="store_true", help="print docs/launches.md instead, and exit")
    arguments = parsed(parser, argv)
    return run_command(lambda: _check(arguments))


def _check(arguments: argparse.Namespace) -> int:
    if arguments.launch_table:
        print(launch_table(), end="")
        return 0
    options = (("--image-size", arguments.image_size, 8), ("--classes", arguments.classes, 2))
    for option, value, least in (*options, ("--processes", arguments.processes, 1)):
        if not least <= value <= LARGEST:
            raise SettingsError(f"{option}: expected {least} to {LARGEST}; got {value}")
    recipe = load_recipe(arguments.recipe).with_settings(arguments.set)
    with fake_group(arguments.processes) as ranks:
        reports = check_recipe(recipe, (arguments.image_size, arguments.image_size), arguments.classes, ranks)
    shared = f" in one of {arguments.processes} processes" if arguments.processes > 1 else ""
    print(f"capture check of {recipe.name}, {STEPS} steps on a fake device{shared}")
    for name, report in reports.items():
        print(f"{name}: {report}")
    return 1 if any(report.findings for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
