"""``python -m rsengine.augment``: see what a policy does to images, before any training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rsengine.augment.policies import POLICIES
from rsengine.config import Recipe, with_short
from rsengine.data import find_dataset
from rsengine.errors import SettingsError, run_command
from rsengine.output import add_output_options, counted, escaped, parsed, print_json, program, speaker
from rsengine.run.augmented import draw_augmented
from rsengine.run.lettering import labels_said


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=program("augment"),
        description="See what a policy does to images, before any training.",
        epilog="example: %(prog)s --policy randaugment --data digits --out augmented.png",
    )
    parser.add_argument("--policy", choices=POLICIES, help="short for --set policy=NAME (default: autoaugment)")
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--data", help="converted folder, source or digits; default: as rsengine.train finds it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another augment setting: cutout_holes=4"
    )
    parser.add_argument("--images", type=int, default=10, help="columns (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="augmented versions of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser, result="what was drawn")
    arguments = parsed(parser, argv)
    return run_command(lambda: _draw(arguments))


def _draw(arguments: argparse.Namespace) -> int:
    if min(arguments.images, arguments.rows) < 1 or arguments.seed < 0:
        raise SettingsError("--images and --rows: expected at least 1, and --seed at least 0")
    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise SettingsError(f"--out {out}: expected a name that ends in .png")
    settings = with_short(arguments.set, {"--policy": ("policy", arguments.policy)})
    recipe = Recipe().with_settings(["augment.policy=autoaugment", *(f"augment.{each}" for each in settings)])
    augment = recipe.augment
    say = speaker(quiet=arguments.quiet, json=arguments.json)
    dataset = find_dataset(arguments.data, fallback_digits=arguments.data is None, log=say)
    examples = draw_augmented(
        dataset,
        augment,
        out,
        title=f"{dataset.name}: {augment.policy}",
        seed=arguments.seed,
        images=arguments.images,
        epochs=arguments.rows,
        labels=labels_said(dataset.classes, say),
    )
    images = len(examples.labels)
    if images < arguments.images:
        say(f"--images {arguments.images}: drawn are all {counted(images, 'image')} of the training set")
    say(f"wrote {escaped(arguments.out)}")
    if arguments.json:
        own = {key: value for key, value in recipe.flat().items() if key.startswith("augment.")}
        drawn = {"out": arguments.out, "dataset": dataset.name, "settings": own, "seed": arguments.seed}
        print_json(drawn | {"images": images, "rows": arguments.rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
