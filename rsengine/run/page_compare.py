"""The page about several runs: their curves in one plot, results with intervals over seeds, what differs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rsengine.config import Recipe
from rsengine.data.errors import UserError
from rsengine.output import counted
from rsengine.run.files import METRICS_FILE, RECIPE_FILE
from rsengine.run.formats import NO_SPREAD, NONE, count, fixed, number, percent
from rsengine.run.intervals import deviation, student_interval
from rsengine.run.log import EPOCH, INTERVAL, START, RunLog, accuracy
from rsengine.run.page import COLOURS, TOOLS, Chart, Line, Markup, Section, document, note, shortened, table, tag
from rsengine.run.page_run import flat, setting, standard_error
from rsengine.run.progress import duration
from rsengine.text import decode

_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_SEED = "train.seed"
_WORDS = {"name", "comment"}  # keys of a recipe that change nothing
_DECISIVE = ("data, identity", "initial weights, sha256")  # of the surroundings, those that make another configuration
_NAMED = 4  # differences in the description of a configuration


class CompareError(UserError):
    """Runs that cannot be compared. The message is one line with the remedy."""


@dataclass(frozen=True)
class Run:
    """What a run folder says. ``label``: what to call it; ``settings``: its recipe as ``section.key``."""

    label: str
    settings: Mapping[str, Any]
    starts: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @property
    def tested(self) -> list[dict[str, Any]]:
        """The epochs with a test accuracy."""
        return [record for record in self.epochs if number(accuracy(record)) is not None]

    @property
    def finished(self) -> bool:
        """Whether it came to the end of its recipe, with an evaluation."""
        planned = number(self.settings.get("train.epochs"))
        return bool(self.tested) and planned is not None and self.tested[-1]["epoch"] >= planned

    @property
    def final(self) -> float | None:
        """The last test accuracy, of the EMA if there is one."""
        return accuracy(self.tested[-1]) if self.tested else None

    @cached_property
    def surroundings(self) -> dict[str, Any]:
        """What beside the recipe decides the result or the speed, by name; what the log does not say is missing."""
        last = self.starts[-1] if self.starts else {}
        data, origin = (last.get(name) or {} for name in ("data", "origin"))
        here, packages = (last.get(name) or {} for name in ("machine", "versions"))
        found = {
            "data": data.get("name"),
            "data, identity": data.get("identity"),
            "test images": data.get("test_images"),
            "test images, sha256": (data.get("sha256") or {}).get("test"),
            "initial weights, sha256": origin.get("sha256"),
            **{name: last.get(name) for name in ("device", "precision", "threads", "graph", "compiled")},
            **{name: here.get(name) for name in ("processor", "logical_cores", "os", "python")},
            "GPU": ", ".join(map(str, here.get("gpus") or [])) or None,
            **packages,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def configuration(self) -> str:
        """Equal for runs that differ in nothing but their seeds, as far as results go."""
        kept = {key: value for key, value in self.settings.items() if key not in _WORDS | {_SEED}}
        return repr((sorted(kept.items()), [self.surroundings.get(name) for name in _DECISIVE]))


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    name: str  # a letter
    runs: Sequence[Run]

    @cached_property
    def seeds(self) -> list[float]:
        """The results of its finished runs, one for each seed: a seed that ran twice says nothing new."""
        found = {repr(run.settings.get(_SEED)): run.final for run in reversed(self.runs) if run.finished}
        return [value for value in found.values() if value is not None]

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two."""
        return deviation(self.seeds)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean over seeds, by Student's t, in [0, 1]; None for fewer than two, and
        for seeds with one result, which tell nothing of others."""
        return student_interval(self.seeds, bounds=(0.0, 1.0))


def read_run(folder: Path, label: str) -> Run:
    """Read a run folder.

    Raises:
        CompareError: it is none.
        LogError: its log is damaged.
    """
    for name in (METRICS_FILE, RECIPE_FILE):
        if not (folder / name).is_file():
            raise CompareError(f"{folder}: no {name} there; give run folders, as rsengine.train writes them")
    try:
        # A setting that an older version did not have yet counts as its default.
        settings = flat(Recipe().to_toml()) | flat(decode((folder / RECIPE_FILE).read_bytes()))
    except ValueError as error:
        raise CompareError(f"{folder / RECIPE_FILE}: not a recipe ({error}); give another run folder") from error
    log = RunLog(folder)
    log.check()
    return Run(label, settings, *(log.records(kind) for kind in (START, INTERVAL, EPOCH)))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read two or more run folders. Their names, or where two are the same their paths, are the labels.

    Raises:
        CompareError: fewer than two, one of them twice, or one that is none.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise CompareError(f"{twice[0]}: named twice; name each run once")
    if len(folders) < 2:
        raise CompareError("only one run is named; name two or more, the page about one is its report.html")
    names = [place.name for place in places]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The configurations of runs, in the order in which they first come."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.configuration, []).append(run)
    return [Group(_letters(i), members) for i, members in enumerate(found.values())]


def _letters(index: int) -> str:
    return (_letters(index // 26 - 1) if index >= 26 else "") + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 26]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all, in the order of the first."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(repr(each.get(key)) != repr(settings[0].get(key)) for each in settings[1:])]


def described(group: Group, groups: Sequence[Group]) -> str:
    """What sets a configuration apart from the others, in a few words: more of them where others share the first."""
    own, *others = (_decisive(each) for each in (group, *groups))
    keys = differing([own, *others])
    named = keys[:_NAMED]
    for other in others:
        apart = [key for key in keys if repr(other.get(key)) != repr(own.get(key))]
        if apart and not set(apart) & set(named):
            named.append(apart[0])
    words = ", ".join(_in_words(key, own.get(key)) for key in named)
    more = f" and {len(keys) - len(named)} more" * (len(keys) > len(named))
    return words + more or str(group.runs[0].settings.get("name"))


def _in_words(key: str, value: Any) -> str:
    """A difference: ``model.depth=50``, or ``data 0123abcd…`` for what is known by a sum alone."""
    if key not in _DECISIVE:
        return f"{key}={setting(value)}"
    return f"{key.partition(',')[0]} {NONE if value is None else shortened(value, 9)}"


def _decisive(group: Group) -> dict[str, Any]:
    """The settings of a configuration and all else that makes it another one."""
    run = group.runs[0]
    kept = {key: value for key, value in run.settings.items() if key not in _WORDS | {_SEED}}
    return kept | {name: run.surroundings.get(name) for name in _DECISIVE}


def comparison(runs: Sequence[Run]) -> bytes:
    """The page about ``runs``, two or more."""
    groups = grouped(runs)
    notes = [tag("p", tag("b", f"{head}: "), words, class_="warning") for head, words in warnings(runs)]
    sections = [
        Section("results", "Results", [*_results(groups), *_runs(groups)]),
        Section("curves", "Curves", [TOOLS, *_curves(groups)]),
        Section("recipes", "Differences of the recipes", [_differences(runs, [run.settings for run in runs])]),
        Section("surroundings", "Other differences", [_differences(runs, [run.surroundings for run in runs])]),
    ]
    return document(f"{len(runs)} runs compared", notes, sections)


def warnings(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """What stands against comparing ``runs``: in a word or two, and in a sentence that names the runs."""
    by_data: dict[str, list[Run]] = {}
    for run in runs:
        by_data.setdefault(_test_set(run, runs), []).append(run)
    if len(by_data) > 1:
        named = (f"{', '.join(run.label for run in same)} on {_data_of(same[0])}" for same in by_data.values())
        yield "Not the same data", f"{'; '.join(named)}; the accuracies of these cannot be compared."
    if silent := [run.label for run in runs if "data, identity" not in run.surroundings]:
        words = "of which data the log does not say enough; compare accuracies only if they are the same"
        yield "Perhaps not the same data", f"{', '.join(silent)}, {words}."
    if unfinished := [f"{run.label} ({_done(run)})" for run in runs if not run.finished]:
        yield "Not finished", f"{', '.join(unfinished)}; left out of the means and intervals."


def _test_set(run: Run, runs: Sequence[Run]) -> str:
    """Equal for two of ``runs`` on the same test set, as far as their logs say. Older ones give the identity of train
    and test set together, or a name alone."""
    name, identity, test = (run.surroundings.get(key) for key in ("data", "data, identity", "test images, sha256"))
    if test is None and identity is not None:  # another of the same identity may say it
        others = [each.surroundings for each in runs if each.surroundings.get("data, identity") == identity]
        test = next((each["test images, sha256"] for each in others if "test images, sha256" in each), None)
    return str(test or identity or name)


def _data_of(run: Run) -> str:
    """The data of a run in words."""
    name, identity = (run.surroundings.get(key) for key in ("data", "data, identity"))
    return f"{name or 'unknown data'}{f' (identity {str(identity)[:8]}…)' if identity else ''}"


def _done(run: Run) -> str:
    """How far a run came that has not finished."""
    if not run.epochs:
        return "no epoch evaluated"
    if not run.tested:
        return "no test accuracy"
    planned = number(run.settings.get("train.epochs"))
    return f"{run.epochs[-1]['epoch']} of {NONE if planned is None else counted(int(planned), 'epoch')}"


def _results(groups: Sequence[Group]) -> Iterator[Markup]:
    rows, keys = [], []
    for group in groups:
        n = len(group.seeds)
        mean = statistics.fmean(group.seeds) if n else None
        spread = NONE if group.spread is None else f"{100 * group.spread:.2f}"
        interval = " to ".join(map(percent, group.interval)) if group.interval else NONE
        if group.spread == 0:
            interval = NO_SPREAD
        seconds = [run.epochs[-1]["seconds"] for run in group.runs if run.finished]
        time = statistics.fmean(seconds) if seconds else None
        words = shortened(described(group, groups), 160)
        rows.append((group.name, words, n, percent(mean), spread, interval, duration(time) if seconds else NONE))
        keys.append((group.name, words, n, mean, group.spread, mean, time))
    head = ("", "Configuration", "Seeds", "Mean accuracy", "Std. dev.", "95 % interval", "Mean time")
    yield table(head, rows, numbers=range(2, 7), keys=keys)
    yield note(
        "Runs of one configuration differ in their seeds alone. Accuracies are test accuracies after the last epoch, "
        "of the EMA weights, or of the raw ones in a run without EMA. The interval is Student's t over the seeds, of "
        "the mean; it needs two of them, and a seed that ran twice counts once."
    )


def _runs(groups: Sequence[Group]) -> Iterator[Markup]:
    rows, keys = [], []
    for group in groups:
        for run in group.runs:
            last, rates = (run.tested or [{}])[-1], [record["images_per_second"] for record in run.intervals]
            images = last.get("test_images") or run.surroundings.get("test images")
            error = standard_error(run.final, images) if run.final is not None else ""
            rate = statistics.median(rates) if rates else None
            done = run.epochs[-1]["epoch"] if run.epochs else 0
            loss = last.get("test_loss_ema") if last.get("test_accuracy_ema") is not None else last.get("test_loss")
            seed, seconds = run.settings.get(_SEED), run.epochs[-1]["seconds"] if run.epochs else None
            epochs = f"{done} of {run.settings.get('train.epochs', NONE)}"
            time = NONE if seconds is None else duration(seconds)
            accuracies = (f"{percent(run.final)}{error}", percent(last.get("test_accuracy")))
            name = shortened(run.label, 80)
            rows.append((name, group.name, setting(seed), *accuracies, fixed(loss, 4), epochs, time, count(rate)))
            keys.append((name, group.name, seed, run.final, last.get("test_accuracy"), loss, done, seconds, rate))
    head = ("Run", "", "Seed", "Test accuracy", "Raw weights", "Test loss", "Epochs", "Time", "Images/s")
    yield tag("h3", "Each run")
    yield table(head, rows, numbers=range(2, 9), keys=keys)
    yield note("± is the standard error that the test images alone leave.")


def _curves(groups: Sequence[Group]) -> Iterator[Chart]:
    def lines(kind: str, fields: Sequence[str], scale: float = 1.0) -> list[Line]:
        found = []
        for i, group in enumerate(groups):
            for j, run in enumerate(group.runs):
                records = run.epochs if kind == EPOCH else run.intervals
                points = []
                for record in records:
                    values = [record[field] for field in fields if number(record.get(field)) is not None]
                    points += [(record["epoch"], scale * values[0])] if values else []
                if points:
                    name = f"{group.name}: {shortened(run.label, 40)}"
                    found.append(Line(name, COLOURS[i % len(COLOURS)], points, _DASHES[j % len(_DASHES)]))
        return found

    yield Chart("Test accuracy (%)", lines(EPOCH, ("test_accuracy_ema", "test_accuracy"), 100.0), " %")
    yield Chart("Test loss", lines(EPOCH, ("test_loss_ema", "test_loss")))
    yield Chart("Train loss", lines(EPOCH, ("train_loss",)))
    yield Chart("Learning rate", lines(INTERVAL, ("learning_rate",)), zero=True)
    yield Chart("Images per second", lines(INTERVAL, ("images_per_second",)), zero=True)


def _differences(runs: Sequence[Run], values: Sequence[Mapping[str, Any]]) -> Markup:
    keys = differing(values)
    if not keys:
        return note("None.")
    rows = [(key, *(tag("code", shortened(setting(each.get(key)), 60)) for each in values)) for key in keys]
    return table(("", *(shortened(run.label, 40) for run in runs)), rows)
