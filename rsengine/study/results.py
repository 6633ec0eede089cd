"""The results of a study: what each variant reached, and what each comparison is worth.

Nothing here depends on how long a trial took, on how often it was stopped or on the order of the trials: on one
machine's CPU the same study gives the same tables, bit for bit.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsengine.run.files import write_atomically
from rsengine.run.formats import number
from rsengine.run.log import accuracy
from rsengine.study.file import Variant
from rsengine.study.manifest import Manifest
from rsengine.study.statistics import Difference, Summary, paired, summary
from rsengine.study.trials import DONE, Outcome, Trial

CSV_FILE, JSON_FILE, MARKDOWN_FILE, PAGE_FILE = "results.csv", "results.json", "results.md", "results.html"
CALIBRATION = {"ece": (0.0, 1.0), "brier": (0.0, 2.0)}  # and their bounds
_WARNING = "warning: "  # how such a line of a run begins


@dataclass(frozen=True)
class TrialResult:
    """A trial and its outcome; None while it has not ended. ``epochs``: the records of its evaluated epochs."""

    trial: Trial
    outcome: Outcome | None
    epochs: Sequence[Mapping[str, Any]]

    @property
    def is_done(self) -> bool:
        return self.outcome is not None and self.outcome.status == DONE and bool(self.epochs)

    @property
    def warnings(self) -> list[str]:
        """The warnings that it gave, each once."""
        if not self.trial.log.is_file():
            return []
        lines = self.trial.log.read_text("utf-8", errors="replace").split("\n")
        return list(dict.fromkeys(line.removeprefix(_WARNING) for line in lines if line.startswith(_WARNING)))

    def calibration(self, name: str) -> float | None:
        """``ece`` or ``brier`` of the last evaluation."""
        found = self.outcome.result.get("calibration") if self.outcome else None
        return number(found.get(name)) if isinstance(found, Mapping) else None


@dataclass(frozen=True)
class VariantResult:
    """A variant with its trials, and what they say.

    Attributes:
        accuracy: by seed, of the last epoch: of the EMA weights, or of the raw ones in a recipe without EMA.
        summary: of ``accuracy``; None while no trial is done.
        difference: to the variant that it is compared with, by seed; None without one, or without a common seed.
        ema: the EMA weights against the raw ones of the same trials; None without an EMA.
        calibration: by name of :data:`CALIBRATION`, its summary and its paired difference.
    """

    variant: Variant
    trials: Sequence[TrialResult]
    accuracy: Mapping[int, float]
    summary: Summary | None
    difference: Difference | None
    ema: Difference | None
    calibration: Mapping[str, tuple[Summary | None, Difference | None]]

    @property
    def failed(self) -> list[TrialResult]:
        """The trials that ended with an error."""
        return [each for each in self.trials if each.outcome is not None and not each.is_done]


def gather(manifest: Manifest, folder: Path) -> list[VariantResult]:
    """Read the trials of the study in ``folder``."""
    trials: dict[str, list[TrialResult]] = {variant.name: [] for variant in manifest.study.variants}
    for trial in manifest.trials(folder):
        outcome = trial.outcome()
        trials[trial.variant].append(TrialResult(trial, outcome, trial.epochs()))
    accuracies = {name: _final(found, accuracy) for name, found in trials.items()}
    return [_variant(each, trials, accuracies) for each in manifest.study.variants]


def _final(trials: Sequence[TrialResult], value: Any) -> dict[int, float]:
    """``value`` of the last epoch's record, by seed, of the trials that are done."""
    found = {each.trial.seed: value(each.epochs[-1]) for each in trials if each.is_done}
    return {seed: known for seed, known in found.items() if number(known) is not None}


def _variant(
    variant: Variant, trials: Mapping[str, Sequence[TrialResult]], accuracies: Mapping[str, Mapping[int, float]]
) -> VariantResult:
    own = trials[variant.name]
    values = accuracies[variant.name]
    raw, ema = (_final(own, lambda record, key=key: record.get(key)) for key in ("test_accuracy", "test_accuracy_ema"))
    calibration = {}
    for name, bounds in CALIBRATION.items():
        by_seed, reference = (_calibrations(trials.get(each, ()), name) for each in (variant.name, variant.reference))
        calibration[name] = _summary(by_seed, bounds), paired(by_seed, reference) if variant.reference else None
    return VariantResult(
        variant=variant,
        trials=own,
        accuracy=values,
        summary=_summary(values, (0.0, 1.0)),
        difference=paired(values, accuracies[variant.reference]) if variant.reference else None,
        ema=paired(ema, raw) if ema else None,
        calibration=calibration,
    )


def _calibrations(trials: Sequence[TrialResult], name: str) -> dict[int, float]:
    found = {each.trial.seed: each.calibration(name) for each in trials if each.is_done}
    return {seed: value for seed, value in found.items() if value is not None}


def _summary(values: Mapping[int, float], bounds: tuple[float, float]) -> Summary | None:
    return summary([values[seed] for seed in sorted(values)], bounds) if values else None


def codes(results: Sequence[VariantResult]) -> list[str]:
    """The versions of the code that the trials were ended with."""
    return sorted({each.outcome.source for result in results for each in result.trials if each.is_done})


# --- files for programs -----------------------------------------------------------------------------------------------

COLUMNS = (
    "variant", "changes", "epochs", "n", "failed", "mean", "deviation", "low", "high", "reference", "pairs",
    "difference", "difference_low", "difference_high", "bootstrap_low", "bootstrap_high", "p_one_sided", "resolved",
    "seeds_needed", "reported_accuracy", "reported_difference", "ema_minus_raw", "ece", "brier",
)  # fmt: skip


def write_csv(folder: Path, manifest: Manifest, results: Sequence[VariantResult]) -> None:
    """Write ``results.csv``, a row a variant. Results are fractions, what was reported is in percent."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for each in results:
        known, difference, variant = each.summary, each.difference, each.variant
        row = [variant.name, " ".join(variant.changes), manifest.recipes[variant.name].train.epochs]
        row += [len(each.accuracy), len(each.failed), *_numbers(known, "mean", "deviation"), *_pair(known, "interval")]
        row += [variant.reference, *_numbers(difference, "n", "mean")]
        row += [*_pair(difference, "student"), *_pair(difference, "bootstrap")]
        row += _numbers(difference, "p", "is_resolved", "needed")
        row += [variant.accuracy, variant.difference, *_numbers(each.ema, "mean")]
        row += [value for name in CALIBRATION for value in _numbers(each.calibration[name][0], "mean")]
        table.writerow(["" if value is None else value for value in row])
    write_atomically(folder / CSV_FILE, text.getvalue().encode())


def as_json(manifest: Manifest, results: Sequence[VariantResult]) -> dict[str, Any]:
    """All results in values that JSON holds; accuracies and differences are fractions, what was reported in percent."""
    study = manifest.study
    return {
        "study": study.name,
        "comment": study.comment,
        "baseline": study.baseline,
        "additive": study.additive,
        "seeds": list(study.seeds),
        "data": dict(manifest.data),
        "code": codes(results),
        "reported_by": study.source,
        "variants": [_json_of(manifest, each) for each in results],
    }


def _json_of(manifest: Manifest, each: VariantResult) -> dict[str, Any]:
    variant = each.variant
    return {
        "variant": variant.name,
        "changes": list(variant.changes),
        "epochs": manifest.recipes[variant.name].train.epochs,
        "reference": variant.reference,
        "reported_accuracy": variant.accuracy,
        "reported_difference": variant.difference,
        "accuracy": _known(each.summary),
        "difference": _known(each.difference),
        "ema_minus_raw": _known(each.ema),
        "calibration": {
            name: {"value": _known(value), "difference": _known(difference)}
            for name, (value, difference) in each.calibration.items()
        },
        "trials": [_json_of_trial(trial) for trial in each.trials],
    }


def _json_of_trial(each: TrialResult) -> dict[str, Any]:
    keys = ("epoch", "test_accuracy", "test_accuracy_ema", "test_loss", "test_loss_ema")
    return {
        "seed": each.trial.seed,
        "status": each.outcome.status if each.outcome else None,
        "why": each.outcome.why if each.outcome else "",
        "warnings": each.warnings,
        "calibration": {name: each.calibration(name) for name in CALIBRATION},
        "epochs": [{key: record.get(key) for key in keys} for record in each.epochs] if each.is_done else [],
    }


def write_json(folder: Path, manifest: Manifest, results: Sequence[VariantResult]) -> None:
    """Write ``results.json``."""
    text = json.dumps(as_json(manifest, results), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / JSON_FILE, text.encode())


def _known(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _numbers(value: Any, *names: str) -> list[Any]:
    return [None if value is None else getattr(value, name) for name in names]


def _pair(value: Any, name: str) -> list[Any]:
    known = None if value is None else getattr(value, name)
    return list(known) if known else [None, None]
