"""Whatever a crash leaves of a conversion, the next start finds the old data set or the new one, whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsengine.data import DataError, Dataset, convert, find_dataset, load_dataset
from rsengine.data.dataset import BETONS
from rsengine.data.identity import content_identity
from tests.crash.simulator import Operation, Tree, build, crashes, joined, key_of, result_of, tree_of


def pictures(folder: Path, seed: int) -> str:
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in ("circle", "square"):
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    return pictures(folder / "old", 0), pictures(folder / "new", 1)


@pytest.fixture
def before(sources, tmp_path) -> Tree:
    """A folder with the old data set in ``out``."""
    convert(sources[0], tmp_path / "before" / "out", log=lambda line: None)
    return tree_of(tmp_path / "before")


def whole(dataset: Dataset) -> str:
    """The identity of a data set that is what it says."""
    identity = content_identity(dataset.classes, [dataset.folder / name for name in BETONS.values()])
    assert dataset.identity == identity
    return identity


def found(out: Path) -> str | None:
    try:
        return whole(load_dataset(out))
    except DataError:
        return None


def next_start(out: Path) -> None:
    """A conversion into the same place, which fails, for there is nothing to convert."""
    with pytest.raises(DataError):
        convert(out.parent / "nothing", out, overwrite=True, log=lambda line: None)


def states(operations: list[Operation], before: Tree) -> Iterator[tuple[Tree, list[int]]]:
    """Each state that a crash may leave, and after how many operations."""
    different: dict[frozenset, tuple[Tree, list[int]]] = {}
    for i, tree in crashes(operations, before):
        different.setdefault(key_of(tree), (tree, []))[1].append(i)
    yield from different.values()


def recorded(recorder, name: str, folder: Path, *arguments: str, before: Tree) -> list[Operation]:
    build(before, folder)
    operations = recorder.record(name, folder, *arguments)
    assert result_of(joined(operations), before) == tree_of(folder)
    return operations


CASES = {"new": ([], {}), "overwrite": (["--overwrite"], None), "empty folder": ([], {"out": None})}
GRID = [pytest.param(case, marks=[] if case == "new" else pytest.mark.thorough) for case in CASES]


@pytest.mark.parametrize("case", GRID)
def test_a_crash_at_any_moment_leaves_the_old_data_set_or_the_new(recorder, sources, before, tmp_path, case):
    options, start = CASES[case]
    start = before if start is None else start
    operations = joined(recorded(recorder, "converted", tmp_path / "root", sources[1], *options, before=start))
    build(start, tmp_path / "old")
    old, new = found(tmp_path / "old" / "out"), found(tmp_path / "root" / "out")
    assert new is not None
    number = 0
    for tree, moments in states(operations, start):
        build(tree, tmp_path / "state")
        out = tmp_path / "state" / "out"
        names = sorted(tree)
        assert found(out) in (old, new, None), names
        next_start(out)
        assert [path for path in out.parent.rglob(".*")] == [], names
        allowed = {new} if moments[-1] == len(operations) else {old, new}
        assert found(out) in allowed, (names, operations[moments[0] - 1])
        shutil.rmtree(tmp_path / "state")
        number += 1
    assert number > 20


@pytest.mark.thorough
def test_a_crash_while_the_cache_is_filled_leaves_what_the_next_run_finds_or_makes(
    recorder, sources, tmp_path, monkeypatch
):
    operations = joined(recorded(recorder, "cached", tmp_path / "root", sources[0], before={}))
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "root" / "cache"))
    expected = whole(find_dataset(sources[0], log=lambda line: None))
    for tree, _ in states(operations, {}):
        build(tree, tmp_path / "state")
        monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "state" / "cache"))
        assert whole(find_dataset(sources[0], log=lambda line: None)) == expected
        assert [path for path in (tmp_path / "state").rglob(".*")] == [], sorted(tree)
        shutil.rmtree(tmp_path / "state")
