"""Recipes to try on a GPU: for 91.19 % on CIFAR-10 within 10 s, and for 94 % within a minute.

They are run on a validation split, so that the test set is read once a recipe is chosen. The CPU's best recipe, and
changes that it had no time for (docs/speedrun.md).
"""

VALIDATION = 0.1  # of the training set
LARGER_CROP = ("augment.crop_padding=4", "augment.cutout_size=12")
CANDIDATES: dict[str, tuple[str, ...]] = {
    "speedrun": (),
    "speedrun, 44 epochs, larger crop": ("train.epochs=44", *LARGER_CROP),
    "width 1, 40 epochs, larger crop": ("model.width_multiplier=1.0", "train.epochs=40", *LARGER_CROP),
    "full-size images from the start, 24 epochs": ("train.start_scale=1.0", "train.epochs=24"),
    "batches of 1,024, 44 epochs, larger crop": ("train.batch_size=1024", "train.epochs=44", *LARGER_CROP),
    "four stages, width 1, 100 epochs, AutoAugment": (
        *("model.blocks=[3,4,6,3]", "model.width_multiplier=1.0", "train.epochs=100", "augment.policy=autoaugment"),
        *LARGER_CROP,
    ),
}


def arguments(name: str) -> tuple[str, ...]:
    """Of ``python -m rsengine.train``, for a candidate."""
    settings = (*CANDIDATES[name], "train.loader=resident", "train.evaluate_every=10")
    return ("--recipe", "speedrun", *(word for setting in settings for word in ("--set", setting)))
