"""Convert a data set of any form to train.beton, test.beton and dataset.json.

    python data/convert.py SOURCE --out DIR

SOURCE is an official CIFAR-10 or CIFAR-100 archive or folder, Parquet files, NumPy arrays, pictures in class folders or
listed in a table, an archive of any of these, `torchvision:NAME[:ROOT]`, or the word `digits`; see docs/data.md.
"""

from __future__ import annotations

import argparse
import csv
import errno
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rsengine.data.beton.reader import MODES
from rsengine.data.beton.split import Measured, count_shared, refuse_bad, verify_beton, write_split
from rsengine.data.dataset import Dataset, load_dataset
from rsengine.data.errors import DataError, few
from rsengine.data.identity import content_identity
from rsengine.data.paths import BETONS, DESCRIPTION, convert_command, expanded
from rsengine.data.sources.archives import file_digest
from rsengine.data.sources.base import Source, with_validation
from rsengine.data.sources.choice import ORDERS, in_order, with_classes, with_subset
from rsengine.data.sources.open import open_source
from rsengine.data.sources.tree import digest_of_list
from rsengine.data.staging import staged_folder
from rsengine.output import (
    OutputError,
    add_output_options,
    counted,
    parsed,
    patient_output,
    print_json,
    program,
    speaker,
)
from rsengine.processor import usable_cpus

PACKAGES = ("rsengine", "numpy", "pillow")
CHANNELS = ("red", "green", "blue")
LARGEST_SIZE, LARGEST_SEED, MOST_WORKERS = 4096, 2**63 - 1, 1024
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded"}


class OptionError(ValueError):
    """An option of :func:`convert` that is out of its range."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    verify: bool = True,
    image_format: str = "raw",
    test_fraction: float | None = None,
    validation: float | None = None,
    subset: float | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = ORDERS[0],
    label_column: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Convert `source` to the folder `out`, which is complete when this returns and untouched when it raises.

    Args:
        source: a path, "torchvision:NAME", or "digits"; see `rsengine.data.sources.open.open_source`.
        out: a folder that does not exist or is empty.
        size: resize the shorter side to this many pixels and crop the central square; None keeps all sizes.
        verify: compare official CIFAR files with their published checksums.
        image_format: "raw" (exact), or "jpg" (JPEG of quality 95: smaller, not exact).
        test_fraction: share of every class to test on where the source has no test set; default 0.1, for digits 0.2.
            A source that has one is refused with it.
        validation: share of every class of the training set that becomes the test set in place of the source's own.
        subset: an int, how many training images to take, or a float, which share of them; the same share of every
            class, chosen after `classes` and `validation`. The test set stays whole.
        classes: names of the classes to take, in the order of the source; None takes all.
        class_order: "string" or "natural", how classes that the source does not number are sorted.
        label_column: the column of a Parquet file or a table that holds the labels, where more than one may.
        seed: chooses those samples.
        workers: threads that decode; default one a processor.
        overwrite: replace a converted data set in `out`.
        progress: show progress bars when the error output is a terminal.
        log: called with one line for each decision.

    Returns:
        The data set, as `load_dataset(out)` returns it.

    Raises:
        DataError: one line naming the file and the remedy.
        OptionError: an option out of range.
    """
    _check_options(size, image_format, test_fraction, validation, seed, workers)
    _check_choice(subset, class_order)
    out = expanded(out)
    workers = workers or len(usable_cpus())
    try:
        with staged_folder(out, overwrite=overwrite) as folder:
            scratch = folder / "scratch"
            scratch.mkdir()
            opened = open_source(
                source,
                scratch,
                verify=verify,
                test_fraction=test_fraction,
                label_column=label_column,
                seed=seed,
                log=log,
            )
            if test_fraction is not None and opened.own_test:
                raise DataError(
                    f"{source}: has a test set, so no share of the training images is set aside for testing; "
                    "leave out --test-fraction, or give --validation in its place"
                )
            opened = in_order(opened, class_order, log)
            if classes is not None:
                opened = with_classes(opened, classes)
            if validation is not None:
                opened = with_validation(opened, validation, seed, log)
            if subset is not None:
                opened = with_subset(opened, subset, seed, log)
            _check(opened, source)
            splits = {"train": opened.train, "test": opened.test}
            if size is not None:
                splits = {name: split.resized(size) for name, split in splits.items()}
            betons = {name: folder / BETONS[name] for name in splits}
            how = {"image_format": image_format, "workers": workers, "progress": progress}
            found = {name: write_split(betons[name], split, **how) for name, split in splits.items()}
            refuse_bad(found.values())
            if opened.one_size:
                _check_sizes(found, source)
            for name, split in splits.items():
                verify_beton(betons[name], split.labels, found[name], image_format)
            if shared := count_shared(betons["train"], betons["test"], (found["train"], found["test"])):
                log(
                    f"{opened.name}: {shared} of {len(opened.test)} test images {'has' if shared == 1 else 'have'} the "
                    "same pixels as a training image, so that the test accuracy may be too high"
                )
            shutil.rmtree(scratch)
            options = {"size": size, "verify": verify, "test_fraction": test_fraction}
            options |= {"validation": validation, "seed": seed}
            options |= {"subset": subset, "classes": None if classes is None else list(classes)}
            options |= {"class_order": class_order, "label_column": label_column}
            dataset = _describe(folder, opened, found, image_format, options, log)
            # Written last, because this file makes the folder a data set.
            (folder / DESCRIPTION).write_text(dataset.to_json(), encoding="utf-8")
    except OSError as error:
        raise DataError(_reason(error, out)) from error
    return load_dataset(out)


def _check_options(
    size: int | None,
    image_format: str,
    test_fraction: float | None,
    validation: float | None,
    seed: int,
    workers: int | None,
) -> None:
    for name, value, least, most in (
        ("size", size, 1, LARGEST_SIZE),
        ("seed", seed, -LARGEST_SEED, LARGEST_SEED),
        ("workers", workers, 1, MOST_WORKERS),
    ):
        if value is not None and not (isinstance(value, int) and least <= value <= most):
            raise OptionError(f"{name}: expected a whole number from {least} to {most}, got {value}")
    if image_format not in MODES:
        raise OptionError(f"image_format: expected {' or '.join(MODES)}, got {image_format}")
    for name, share in (("test_fraction", test_fraction), ("validation", validation)):
        if share is not None and not 0 < share < 1:
            raise OptionError(f"{name}: expected a share between 0 and 1, got {share}")


def _check_choice(subset: float | None, class_order: str) -> None:
    if subset is not None and not (subset >= 1 if isinstance(subset, int) else 0 < subset < 1):
        raise OptionError(f"subset: expected a share between 0 and 1 or a whole number of images, got {subset}")
    if class_order not in ORDERS:
        raise OptionError(f"class_order: expected {' or '.join(ORDERS)}, got {class_order}")


def _reason(error: OSError, out: Path) -> str:
    """What the system refused, where, and the remedy."""
    if error.errno in FULL:
        disk = Path(os.path.realpath(out))
        while not os.path.ismount(disk):
            disk = disk.parent
        free = shutil.disk_usage(disk).free >> 20
        return f"{out}: {FULL[error.errno]} on the disk at {disk} ({free} MiB free); make room, or take another disk"
    if error.errno == errno.EFBIG:
        return f"{out}: a file may not become as large as needed; raise the limit (ulimit -f unlimited)"
    name = out if error.filename is None else error.filename
    return f"{name}: {error.strerror or error}; check the path, permissions and disk space"


def _check(source: Source, given: str | Path) -> None:
    """Raise DataError unless every class has a sample in either split."""
    if len(source.classes) < 2:
        raise DataError(f"{given}: at least two classes are needed, found {len(source.classes)}; give more data")
    for name, split in (("train", source.train), ("test", source.test)):
        counts = np.bincount(split.labels, minlength=len(source.classes))
        if empty := [source.classes[label] for label in np.flatnonzero(counts == 0)]:
            which = f"class {empty[0]} has" if len(empty) == 1 else f"classes {few(empty)} have"
            raise DataError(f"{given}: {which} no images in {name}; add some, or take out what has none")


def _check_sizes(found: dict[str, Measured], given: str | Path) -> None:
    """Raise DataError unless all images have one size."""
    if len({size for each in found.values() for size in zip(each.heights, each.widths, strict=True)}) > 1:
        remedy = f"convert it with `{convert_command()} {shlex.quote(str(given))} --out DIR --size 32`"
        raise DataError(f"{given}: its images differ in size; {remedy}")


def _describe(
    folder: Path,
    source: Source,
    found: dict[str, Measured],
    image_format: str,
    options: dict[str, object],
    log: Callable[[str], None],
) -> Dataset:
    mean, std = found["train"].mean_and_std()
    if flat := [channel for channel, value in zip(CHANNELS, std, strict=True) if value == 0]:
        log(
            f"{source.name}: {' and '.join(flat)} {'is' if len(flat) == 1 else 'are'} the same in all pixels of train, "
            "so the standard deviation there counts as 1"
        )
        std = tuple(value or 1.0 for value in std)  # inputs are divided by it
    sizes = {size for each in found.values() for size in zip(each.heights, each.widths, strict=True)}
    counts = {
        name: tuple(int(n) for n in np.bincount(split.labels, minlength=len(source.classes)))
        for name, split in (("train", source.train), ("test", source.test))
    }
    checksum = source.checksum
    if checksum is None:
        digests = found["train"].digests + found["test"].digests
        checksum = digest_of_list(zip(source.paths, digests, strict=True))
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"  # rsengine run from a checkout
    return Dataset(
        folder=folder,
        name=source.name,
        classes=source.classes,
        train_count=sum(counts["train"]),
        test_count=sum(counts["test"]),
        class_counts=counts,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        mean=mean,
        std=std,
        checksum=checksum,
        source=source.form,
        image_format=image_format,
        versions=versions,
        options=options,
        identity=content_identity(source.classes, [folder / BETONS[split] for split in ("train", "test")]),
        sha256={split: file_digest(folder / name, "sha256") for split, name in BETONS.items()},
    )


def summary(dataset: Dataset, seconds: float) -> str:
    """Two lines about a conversion that has just ended, and how to train on the result."""
    size = "sizes differ" if dataset.image_size is None else f"{dataset.image_size[1]}×{dataset.image_size[0]}"
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (dataset.mean, dataset.std))
    first = (
        f"{dataset.name}: {dataset.train_count} training and {counted(dataset.test_count, 'test image')}, "
        f"{counted(len(dataset.classes), 'class', 'classes')}, {size}, mean ({mean}), std ({std}), {seconds:.1f} s"
    )
    if dataset.image_size is None:
        return f"{first}\nTraining needs one size: convert again with --size N"
    return f"{first}\nTrain on it with: python -m rsengine.train --data {shlex.quote(str(dataset.folder))}"


def written(dataset: Dataset, seconds: float) -> dict[str, Any]:
    """The data set in values that JSON holds: the object of ``--json``."""
    return {
        "folder": str(dataset.folder),
        "dataset": dataset.name,
        "classes": list(dataset.classes),
        "train_images": dataset.train_count,
        "test_images": dataset.test_count,
        "image_size": None if dataset.image_size is None else list(dataset.image_size),
        "image_format": dataset.image_format,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "identity": dataset.identity,
        "seconds": seconds,
    }


def _parser() -> argparse.ArgumentParser:
    command = program("convert")
    parser = argparse.ArgumentParser(
        prog=convert_command() if command.endswith(".convert") else command,
        description="Convert a data set to train.beton, test.beton and dataset.json.",
        epilog="example: %(prog)s digits --out data/digits",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="archive, folder or file of a data set, torchvision:NAME[:ROOT], or digits"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--size", type=int, metavar="N", help="resize the shorter side to N pixels, crop to N×N")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not check the checksums of official CIFAR files"
    )
    parser.add_argument("--image-format", choices=list(MODES), default="raw", help="raw (exact) or jpg (smaller)")
    parser.add_argument(
        "--test-fraction", type=float, metavar="F", help="share to test on without a test set (0.1; digits 0.2)"
    )
    parser.add_argument(
        "--validation", type=float, metavar="F", help="test on this share of the training set, not on the test set"
    )
    parser.add_argument(
        "--subset", type=_amount, metavar="N", help="train on a share (0.1) or number (5000) of the training images"
    )
    parser.add_argument(
        "--classes", type=_names, metavar="A,B", help='take these classes alone; a name with a comma as "A, B"'
    )
    parser.add_argument(
        "--class-order", choices=ORDERS, default=ORDERS[0], help="sort class names as strings, or numbers by value"
    )
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels, where more than one may be")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses those shares (default 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one a processor)")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted data set in DIR")
    add_output_options(parser, result="what was written")
    return parser


def _amount(text: str) -> float:
    """A whole number of images, in whatever form (5000, 5e3), or a share. What 1.0 is cannot be told, and 1 is one."""
    if text.isdecimal():
        return int(text)
    value = float(text)
    return int(value) if value.is_integer() and value > 1 else value


def _names(text: str) -> list[str]:
    """Names with commas between them; one with a comma inside stands in quotation marks."""
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    with patient_output():
        options = vars(parsed(_parser(), arguments))  # its help has characters that the output may lack
        quiet, as_json, start = options.pop("quiet"), options.pop("json"), time.monotonic()
        say = speaker(quiet=quiet, json=as_json)
        try:
            dataset = convert(**options, progress=not quiet, log=say)
            seconds = time.monotonic() - start
            say(summary(dataset, seconds))
            if as_json:
                print_json(written(dataset, seconds))
        except (DataError, OptionError, OutputError) as error:
            print(f"error: {error}", file=sys.stderr)
            return getattr(error, "status", 2)
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
        return 0


if __name__ == "__main__":
    sys.exit(main())
