"""Whatever a crash leaves of a run, a resume finds the state of the last save or of the one under way, whole.

A real run is recorded; every state that a crash may leave of its folder is built and recovered by what a resume calls.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rsengine import training
from rsengine.config import load_recipe
from rsengine.device import choose_execution
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.files import BEST_FILE, CHECKPOINT_FILE, METRICS_FILE, RECIPE_FILE, WEIGHTS_FILE, remove_leftovers
from rsengine.run.folder import locked
from rsengine.run.log import START, RunLog
from rsengine.trainer import Trainer
from tests.crash.scenarios import Recorder
from tests.crash.simulator import Disk, Operation, Tree, build, crashes, joined, key_of, kills, result_of, tree_of
from tests.test_train import RECIPE

SAVES = {  # two batches an epoch and a save after each, or four and a save after the last
    "step": ["train.checkpoint_minutes=1e-9", "train.limit_train_batches=2"],
    "epoch": ["train.checkpoint_minutes=0", "train.limit_train_batches=4"],
}
CHECKPOINT = f"run/{CHECKPOINT_FILE}"
TIMES = {"seconds", "epoch_seconds", "eval_seconds", "images_per_second", "time_to_first_step"}
TIMES |= {"loader_seconds", "checkpoint_seconds"}
Position = tuple[int, int]


@dataclass
class Recorded:
    """A run that was recorded in ``root``: the operations, what was there before, and what the run had written."""

    operations: list[Operation]
    before: Tree
    raw: list[Operation]
    arguments: list[str]
    after: Tree = field(init=False)
    versions: dict[str, list[bytes]] = field(default_factory=dict)  # by name, what took its place, whole
    saves: list[tuple[int, int, bytes]] = field(default_factory=list)  # after how many operations it may and must be

    def __post_init__(self) -> None:
        disk, renamed = Disk(self.before), 0
        for path, content in self.before.items():
            self.versions.setdefault(path, []).append(content)
        for i, each in enumerate(self.operations, start=1):
            disk.follow(each)
            if each.kind == "rename":
                self.versions.setdefault(each.other, []).append(disk.now.tree()[each.other])
                renamed = i if each.other == CHECKPOINT else renamed
            if each.kind == "sync" and each.path == "run" and renamed:
                self.saves.append((renamed, i, self.versions[CHECKPOINT][-1]))
                renamed = 0
        self.after = disk.now.tree()


class Checkpoints:
    """Those that a run has saved, by their bytes and by their position: epochs and batches done."""

    def __init__(self, recorded: Recorded, scratch: Path) -> None:
        self.at: dict[bytes, Position] = {}
        self.states: dict[Position, dict[str, Any]] = {}
        self.bytes: dict[Position, bytes] = {}
        for content in recorded.versions[CHECKPOINT]:
            (scratch / "checkpoint").write_bytes(content)
            state = load_checkpoint(scratch / "checkpoint")
            position = self.at[content] = state["epoch"], state["batch"]
            self.states[position], self.bytes[position] = state, content


class Resume:
    """What the command does with the folder of a run, without the start of a process."""

    def __init__(self, dataset, recipe: str, settings: list[str]) -> None:
        self.recipe = load_recipe(recipe).with_settings(settings)
        self.said: list[str] = []
        execution = choose_execution("cpu", self.recipe.train.precision)
        self.trainer = Trainer(self.recipe, dataset, execution, Path(), graph=False, say=self.said.append)

    def __call__(self, run: Path) -> Position | None:
        """Returns the epochs and batches done. Without a checkpoint the run is begun anew, and None returned."""
        self.said.clear()
        if not (run / CHECKPOINT_FILE).exists():
            with contextlib.ExitStack() as held:
                training._begin(self.trainer, run, held, self.said.append)
                remove_leftovers(run)
            assert RunLog(run).records() == []
            return None
        with locked(run, self.said.append):
            state = load_checkpoint(run / CHECKPOINT_FILE)
            self.trainer.set_folder(run)
            self.trainer.restore(state)
            remove_leftovers(run)
        return state["epoch"], state["batch"]


def check(recorded: Recorded, resume: Resume, scratch: Path) -> int:
    """Recover every state that a crash may leave. Returns how many different ones there are."""
    states: dict[frozenset, tuple[Tree, list[int]]] = {}
    for i, tree in crashes(recorded.operations, recorded.before):
        states.setdefault(key_of(tree), (tree, []))[1].append(i)
    checkpoints = Checkpoints(recorded, scratch)
    before = recorded.before.get(CHECKPOINT)
    order = [checkpoints.at.get(before), *(checkpoints.at[content] for _, _, content in recorded.saves)]
    for tree, moments in states.values():
        build(tree, scratch / "state")
        try:
            position = resume(scratch / "state" / "run")
            for i in moments:
                possible = sum(may <= i for may, _, _ in recorded.saves)
                certain = sum(must <= i for _, must, _ in recorded.saves)
                assert position in order[certain : possible + 1], f"resumed at {position}"
            assert_agrees(recorded, checkpoints, position, resume, scratch / "state" / "run")
        except Exception as error:
            last = recorded.operations[moments[0] - 1] if moments[0] else "the beginning"
            files = {path: None if content is None else len(content) for path, content in tree.items()}
            raise AssertionError(f"after {last}, with {files}: {error!r}") from error
        shutil.rmtree(scratch / "state")
    return len(states)


def assert_agrees(
    recorded: Recorded,
    checkpoints: Checkpoints,
    position: Position | None,
    resume: Resume,
    run: Path,
    *,
    times: bool = True,
) -> None:
    """All that lies in the folder of a run which was resumed at a position is of that position, and whole.

    Without ``times`` the folder is of another run than the one recorded, which differs from it in these alone.
    """
    made_again = {METRICS_FILE, RECIPE_FILE}
    if position is not None:
        made_again = {CHECKPOINT_FILE, METRICS_FILE, RECIPE_FILE, WEIGHTS_FILE, BEST_FILE}
        state, (epoch, batch) = checkpoints.states[position], position
        assert not [line for line in resume.said if "lost" in line or "cannot be made again" in line], resume.said
        steps = epoch * resume.trainer.steps_per_epoch + batch
        expected = [record for record in shown(recorded.after, times) if record["step"] <= steps]
        assert shown(run, times) == expected
        if epoch:
            weights, ema = load_file(run / WEIGHTS_FILE), checkpoints.states[epoch, 0]["step"]["ema"]
            assert weights.keys() == ema.keys() and all(torch.equal(weights[name], ema[name]) for name in ema)
        if best := state["best"]["epoch"]:
            assert load_checkpoint(run / BEST_FILE)["epoch"] == best
            assert not times or (run / BEST_FILE).read_bytes() == checkpoints.bytes[best, 0]
    assert (run / RECIPE_FILE).read_text() == resume.recipe.to_toml()
    for path in run.iterdir():
        assert not path.name.startswith("."), f"{path.name} is left"
        if path.name not in made_again and times:
            assert path.read_bytes() in recorded.versions[f"run/{path.name}"], f"{path.name} is not whole"
        elif path.suffix == ".png":
            Image.open(path).load()


def shown(where: Path | Tree, times: bool) -> list[dict[str, Any]]:
    """The records of a run, without those that later processes added when they began, with or without their times."""
    content = (where / METRICS_FILE).read_bytes() if isinstance(where, Path) else where[f"run/{METRICS_FILE}"]
    records = [json.loads(line) for line in content.splitlines()]
    records = [record for record in records if record["kind"] != START or not record["resumed"]]
    return records if times else [{key: record[key] for key in record.keys() - TIMES} for record in records]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "toy.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def record(recorder, recipe, toy_dataset, tmp_path):
    """Records a run of so many epochs, or its resume where a tree is given; and what resumes it."""
    options = ["--recipe", recipe, "--data", str(toy_dataset.folder), "--device", "cpu"]

    def recorded(epochs: int, every: str = "step", before: Tree | None = None) -> tuple[Recorded, Resume]:
        before, root = before or {}, tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        build(before, root)
        settings = [f"train.epochs={epochs}", "train.log_interval=1", *SAVES[every]]
        arguments = [*options, *(f"--set={each}" for each in settings), *["--resume"] * bool(before)]
        raw = recorder.record("train", root, *arguments)
        operations = joined(raw)
        assert result_of(operations, before) == tree_of(root)  # nothing escaped the recorder
        return Recorded(operations, before, raw, arguments), Resume(toy_dataset, recipe, settings)

    (tmp_path / "scratch").mkdir()
    return recorded


def test_a_crash_at_any_moment_leaves_the_last_save_or_the_next(record, tmp_path):
    assert check(*record(epochs=1), tmp_path / "scratch") > 100


@pytest.mark.thorough
@pytest.mark.parametrize("every", SAVES)
def test_so_it_does_in_longer_runs_and_while_they_resume(record, tmp_path, every):
    """Of four epochs, some are not the best; the resume begins where a kill fell between a save and the weights."""
    run, resume = record(4, every)
    assert check(run, resume, tmp_path / "scratch") > 300
    may, _, content = next(save for save in run.saves if save[0] > len(run.operations) // 2)
    (killed,) = [tree for i, tree in kills(run.operations) if i == may]
    again, resume = record(4, every, before=killed)
    again.versions = {path: run.versions.get(path, []) + found for path, found in again.versions.items()}
    assert check(again, resume, tmp_path / "scratch") > 100


def faults(recorded: Recorded) -> list[int]:
    """The numbers of all operations that were tried; of many writes to a file, one after another, three."""
    found: list[int] = []
    writes: list[Operation] = []
    numbers = {each.number: each for each in recorded.raw if each.kind == "write"}
    for number in range(1, recorded.raw[-1].number + 1):
        each = numbers.get(number)
        if writes and (each is None or each.path != writes[0].path):
            found += sorted({writes[i].number for i in (0, len(writes) // 2, -1)})
            writes.clear()
        if each is None:
            found.append(number)
        else:
            writes.append(each)
    return found + [each.number for each in writes]


def assert_fails_whole(run: Recorded, resume: Resume, recorder: Recorder, scratch: Path, numbers: list[int]) -> None:
    """Let operations fail, one at a time, and look at what is said and what is left."""
    checkpoints = Checkpoints(run, scratch)
    order = [None, *(checkpoints.at[content] for _, _, content in run.saves)]
    saved = [[run.operations[i - 1].number for i in (may, must)] for may, must, _ in run.saves]
    operations = {each.number: each for each in run.raw}
    tried = [(number, error) for number in numbers for error in (errno.EIO, errno.ENOSPC)]
    came = recorder.fail("train", tried, *run.arguments)
    wrong = []
    for (number, error), failed in zip(tried, came, strict=True):
        possible, certain = (sum(numbers[i] < number for numbers in saved) for i in (0, 1))
        if failed.status == 0:  # it did not matter
            certain = possible = len(saved)
        try:
            line = rf"error: \S+: .*{os.strerror(error)}.*: .*; .*\n"
            assert failed.status == 0 or failed.status == 2 and re.fullmatch(line, failed.error)
            tidied = number in operations and operations[number].kind == "unlink"  # or tried to
            assert tidied or not list(failed.folder.rglob(".*"))
            position = resume(failed.folder / "run")
            assert position in order[certain : possible + 1], f"resumed at {position}"
            assert_agrees(run, checkpoints, position, resume, failed.folder / "run", times=False)
        except Exception as problem:
            what = f"{os.strerror(error)} at {operations.get(number, number)}"
            wrong.append(f"{what}: status {failed.status}, {failed.error}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_a_disk_that_fails_at_an_operation_is_one_line_and_leaves_the_old_state(record, recorder, tmp_path):
    run, resume = record(epochs=1)
    chosen = faults(run)[6::30]
    assert len(chosen) > 1
    assert_fails_whole(run, resume, recorder, tmp_path / "scratch", chosen)


@pytest.mark.thorough
def test_so_it_does_at_any_operation(record, recorder, tmp_path):
    run, resume = record(epochs=1)
    assert_fails_whole(run, resume, recorder, tmp_path / "scratch", faults(run))
