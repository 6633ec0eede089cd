"""``python -m rsengine.export RUN --to FORMAT --out DIR``: what a run has learned, for timm, ONNX Runtime and more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rsengine.errors import run_command
from rsengine.export.formats import FORMATS, export
from rsengine.output import escaped, parsed, program

EXAMPLE = "example: %(prog)s runs/quickstart-20261126-140000 --to onnx --uint8 --out exported"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for bad input."""
    formats = "\n".join(f"  {name:12} {words}" for name, words in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog=program("export"),
        description=f"Write the network of a run in a format that others load, with a model card.\n\n{formats}",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a run folder, or its weights.safetensors")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--out", required=True, metavar="DIR|FILE", help="the folder to write into, or the file")
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="onnx, torch: take (N, H, W, 3) uint8 pixels; by default (N, 3, H, W) float32, normalised",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="onnx: version of the operators (default: PyTorch's)")
    parser.add_argument(
        "--aot-inductor", action="store_true", help="torch: machine code for this kind of processor, by AOTInductor"
    )
    return run_command(lambda: _export(parsed(parser, argv)))


def _export(arguments: argparse.Namespace) -> int:
    options = {"uint8": arguments.uint8, "opset": arguments.opset, "compiled": arguments.aot_inductor}
    for path in export(arguments.run, arguments.to, arguments.out, **options):
        print(f"wrote {escaped(path)} ({path.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
