"""``rsengine recipes``: the recipes that come with rsengine, as a table, or one of them as TOML."""

from __future__ import annotations

import argparse
import sys
import textwrap

from rsengine.config import Recipe, load_recipe, recipe_names
from rsengine.errors import run_command
from rsengine.output import add_output_options, parsed, print_json, print_result, program

HEAD = ("recipe", "epochs", "batch", "learning rate", "policy", "network")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for a name that is no recipe."""
    parser = argparse.ArgumentParser(
        prog=program("recipes", "recipe_table"),
        description="List the recipes that come with rsengine, or print one as TOML.",
        epilog="example: %(prog)s quickstart > mine.toml",
    )
    parser.add_argument("recipe", nargs="?", help="print this one, or that in a TOML file, with every setting")
    add_output_options(parser, result="settings by recipe", quiet=False)
    arguments = parsed(parser, argv)
    return run_command(lambda: _print(arguments))


def _print(arguments: argparse.Namespace) -> int:
    recipes = [load_recipe(name, "recipe") for name in ([arguments.recipe] if arguments.recipe else recipe_names())]
    if arguments.json:
        print_json({recipe.name: recipe.flat() for recipe in recipes})
    else:
        print_result(recipes[0].to_toml().rstrip() if arguments.recipe else _table(recipes))
    return 0


def _table(recipes: list[Recipe]) -> str:
    rows = [HEAD, *(_row(recipe) for recipe in recipes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for recipe in recipes:
        sentence = " ".join(recipe.comment.split())
        lines += ["", *textwrap.wrap(f"{recipe.name}: {sentence}", 100, subsequent_indent="  ")]
    return "\n".join(lines)


def _row(recipe: Recipe) -> tuple[str, ...]:
    train, model = recipe.train, recipe.model
    blocks = f"blocks {'-'.join(map(str, model.blocks))}" if model.blocks else f"ResNet-RS-{model.depth}"
    width = f", width x{model.width_multiplier:g}" if model.width_multiplier != 1 else ""
    rate = f"{recipe.schedule.learning_rate:g} {recipe.schedule.name}"
    policy = recipe.augment.policy
    return recipe.name, str(train.epochs), str(train.batch_size), rate, policy, f"{blocks}{width}"


if __name__ == "__main__":
    sys.exit(main())
