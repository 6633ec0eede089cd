"""``rsengine COMMAND``: every command of the package under one name."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from rsengine.output import patient_output

FOUND, UNKNOWN = 0, 2


@dataclass(frozen=True)
class Command:
    """A command: the module whose ``main(argv)`` it is, what it does, and an example."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "train": Command("rsengine.train", "train a network as a recipe says", "--data digits --out runs/first"),
    "convert": Command("rsengine.data.convert", "convert a data set of any form", "cifar-10.tar.gz --out data/cifar10"),
    "evaluate": Command("rsengine.evaluate", "measure a trained network on a test set", "runs/first --data digits"),
    "predict": Command("rsengine.predict", "classify pictures", "runs/first cat.jpg"),
    "export": Command("rsengine.export.__main__", "write a network for others", "runs/first --to onnx --out out"),
    "compare": Command("rsengine.compare", "show several runs in one page", "runs/first runs/second"),
    "study": Command("rsengine.study.__main__", "compare recipes over seeds", "label-smoothing --epochs 2"),
    "augment": Command("rsengine.augment.__main__", "see what a policy does to images", "--out augmented.png"),
    "recipes": Command("rsengine.recipe_table", "list the recipes, or print one", "quickstart"),
    "doctor": Command("rsengine.doctor", "say what this machine has, and what is missing", ""),
}


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status of the command in it; 2 where there is none of that name."""
    arguments = sys.argv[1:] if argv is None else argv
    with patient_output():
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return FOUND if arguments else UNKNOWN
        if arguments[0] == "--version":
            from rsengine import __version__

            print(f"rsengine {__version__}")
            return FOUND
        name = arguments[0]
        if name not in COMMANDS:
            print(f"error: {name}: no such command{_nearest(name)}", file=sys.stderr)
            return UNKNOWN
    return importlib.import_module(COMMANDS[name].module).main(arguments[1:])


def _help() -> str:
    lines = ["usage: rsengine COMMAND [OPTIONS]", "", "commands, each with an example:"]
    for name, command in COMMANDS.items():
        lines += [f"  {name:10}{command.summary}", f"{'':12}rsengine {name} {command.example}".rstrip()]
    lines += ["", "`rsengine COMMAND --help` lists the options of one; `rsengine --version` prints the version."]
    lines += ["Exit status: 0 done, 1 done in part or diverged, 2 bad input, 130 Ctrl-C, 143 SIGTERM."]
    return "\n".join(lines)


def _nearest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
