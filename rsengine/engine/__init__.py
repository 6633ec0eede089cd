"""The training step: from a recipe to one captured tensor program."""
