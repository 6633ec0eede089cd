"""Damage every kind of file that the program reads, and see that it says so in one line: `scripts/fuzz_check.py [N]`

Each of N inputs (default 1,000) is a whole file damaged by flipped bits, cuts, splices and extremes, or by wrong values
where its form is known. The commands read it in a child process with limits of time and memory. They must take it, or
end with exit status 2 and one line on the standard error. Faults are tracebacks, signals, hangs, other words on the
standard error, half-written output, a result that is not a number, code run from a pickle, and damage that a checksum
shows and that was accepted. Prints a table, and exits 1 after a fault; its input is kept for another look.

Input k of a seed is the same each time, however many there are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # a child of a process with threads of OpenMP would wait for them for ever
from rsengine.cache import keep_compiled_code  # noqa: E402

keep_compiled_code()

import torch  # noqa: E402
from fuzzing.mutations import STRUCTURAL, damage_bytes  # noqa: E402
from fuzzing.samples import SETTINGS, Sample, make_samples  # noqa: E402

from rsengine import evaluate, predict, train  # noqa: E402
from rsengine.config import Recipe  # noqa: E402
from rsengine.data import DataError, load_dataset  # noqa: E402
from rsengine.data import convert as converted  # noqa: E402
from rsengine.data.convert import main as convert  # noqa: E402
from rsengine.data.identity import content_identity  # noqa: E402
from rsengine.data.sources.images import decode_rgb  # noqa: E402
from rsengine.run.checkpoint import load_checkpoint  # noqa: E402
from rsengine.run.weights import load_weights  # noqa: E402
from rsengine.trainer import Trainer  # noqa: E402

MEMORY = 3 << 30  # bytes that a child may take beside what it begins with
CPU = ["--device", "cpu"]
OUTCOMES = ("refused", "accepted", "unnoticed", "fault")
# Kinds whose bytes a checksum covers, and the damage by which it still covers the same files: a tar has none over all.
COVERED = {"beton", "checkpoint", "weights", "tar", "tar.gz", "zip", "png"}
FLIPS = ("flip", "extreme", "zero")


@dataclass(frozen=True)
class Input:
    """One damaged input.

    Attributes:
        kind: what was damaged.
        files: relative path -> content.
        target: the file that was damaged.
        how: "values", or what was done to its bytes.
    """

    kind: str
    files: dict[str, bytes]
    target: str
    how: str
    rng: random.Random


def make_input(samples: dict[str, list[Sample]], kinds: Sequence[str], seed: int, number: int) -> Input:
    """Input ``number`` of ``seed``; those below 0 are the samples themselves, which must be taken."""
    rng = random.Random(f"{seed}:{number}")
    if number < 0:
        kind, sample, target = whole_samples(samples)[number]
        return Input(kind, sample.files, target, "whole", rng)
    kind = kinds[number % len(kinds)]
    sample = rng.choice(samples[kind])
    target = rng.choice(sample.targets)
    data = sample.files[target]
    if rng.random() < 0.5:
        new, how = STRUCTURAL[kind](data, rng), "values"
    else:
        new, how = damage_bytes(data, rng)
    files = sample.files | {target: new}
    if kind == "beton" and rng.random() < 0.4:  # as an older version wrote it: what is behind the checksum is tried too
        description = json.loads(files["data/dataset.json"])
        files["data/dataset.json"] = json.dumps({k: v for k, v in description.items() if k != "sha256"}).encode()
    return Input(kind, files, target, how, rng)


def whole_samples(samples: dict[str, list[Sample]]) -> list[tuple[str, Sample, str]]:
    """Every sample once, with its kind and a file to damage."""
    return [(kind, sample, sample.targets[0]) for kind, each in samples.items() for sample in each]


# --- what a child does ------------------------------------------------------------------------------------------------


def run_command(given: Input, home: Path) -> int:
    """Read the input, which lies in the current folder, by the command for its kind. Returns the exit status."""
    data, weights = ["--data", str(home / "data")], str(home / "run" / "weights.safetensors")
    kind, some = given.kind, given.rng.random() < 0.5
    if kind in ("beton", "dataset.json"):
        if given.target == "data/test.beton" or (kind == "dataset.json" and some):
            return evaluate.main([weights, "--data", "data", *CPU])
        loader = given.rng.choice((Recipe().train.loader, "resident"))
        settings = [*SETTINGS, "--set", f"train.loader={loader}", "--epochs", "1"]
        return train.main(["--data", "data", "--out", "out", *settings, *CPU])
    if kind in ("checkpoint", "metrics"):
        if kind == "checkpoint":
            train.write_records = lambda *_, **__: None  # pictures of records that are whole
        return train.main(["--resume", "--out", "run", *data, *CPU])
    if kind == "recipe":
        Trainer.run = _stop  # what it asks for may take days: it is built, stopped and drawn
        return 0 if (status := train.main(["--recipe", "recipe.toml", "--out", "out", *data, *CPU])) == 130 else status
    if kind == "weights" and some:
        return evaluate.main(["weights.safetensors", *data, *CPU])
    if kind in ("weights", "picture"):
        file = weights if kind == "picture" else "weights.safetensors"
        picture = given.target if kind == "picture" else str(home / "pictures/train/cat/000.png")
        return predict.main([file, picture, *CPU])
    source = given.target if kind != "cifar" else "cifar"
    return convert([source, "--out", "out", "--quiet", "--no-verify", "--workers", "1"])


def _stop(trainer: Trainer) -> int:
    trainer.log.path.touch()
    return signal.SIGINT


def content(kind: str, target: str) -> str:
    """A digest of what was read, whatever bytes it was read from."""
    if kind == "beton":
        try:
            dataset = load_dataset("data")
            return content_identity(dataset.classes, (dataset.train_beton, dataset.test_beton))
        except DataError:
            return "damaged"  # and accepted all the same
    if kind == "checkpoint":
        return _digest(load_checkpoint(Path(target)))
    if kind == "weights":
        weights = load_weights(target)
        about = weights.recipe.to_toml(), weights.classes, weights.image_size, weights.mean, weights.std
        return _digest([weights.model.state_dict(), about])
    if kind == "picture":
        return hashlib.sha256(decode_rgb(Path(target).read_bytes(), target)).hexdigest()
    return load_dataset("out").identity


def _digest(value: object) -> str:
    total = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            add([part for item in value.items() for part in item])
        elif isinstance(value, list | tuple):
            total.update(f"[{len(value)}".encode())
            for each in value:
                add(each)
        else:
            total.update(repr(value).encode() + b";")

    add(value)
    return total.hexdigest()


def child(work: Callable[[], int], folder: Path) -> int:
    """Begin a process that does ``work`` in ``folder`` and writes there what it prints. Returns its number."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here too: which of the two comes first is open
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def work(given: Input, home: Path) -> int:
    """The command; and where it took the input, the digest of what it read into ``digest.txt``."""
    status = run_command(given, home)
    if status == 0 and checked(given):
        Path("digest.txt").write_text(content(given.kind, given.target))
    return status


# --- what the parent finds --------------------------------------------------------------------------------------------


def checked(given: Input) -> bool:
    """Whether a checksum covers what was damaged."""
    kind = "png" if given.target.endswith(".png") else given.kind
    if given.how == "values":
        return kind == "beton"  # whose checksum is in another file
    return kind in COVERED and (kind != "tar" or given.how in FLIPS)


def judge(given: Input, folder: Path, status: int | None, expected: dict[tuple[str, str], str]) -> tuple[str, str]:
    """One of :data:`OUTCOMES`, and why. ``status``: the exit status, less than 0 for a signal, None for a hang."""
    out, errors = ((folder / f"{name}.txt").read_text(errors="replace") for name in ("stdout", "stderr"))
    lines = errors.splitlines()
    if (
        given.target.endswith(".tif") and "Traceback" not in errors
    ):  # libtiff has words of its own, which Pillow lets out
        lines = [line for line in lines if line.startswith("error: ")]
    if (folder / "canary").exists():
        return "fault", "code from the file ran"
    if status is None:
        return "fault", "hang"
    if status < 0:
        return "fault", f"signal {signal.Signals(-status).name}"
    if "Traceback" in errors or status not in (0, 2):
        return "fault", f"exit status {status}: {lines[-1][:300] if lines else 'no words'}"
    if status == 2:
        left = [path.name for path in folder.iterdir() if path.name == "out" or path.name.startswith(".out")]
        if given.kind in ("tar", "tar.gz", "zip", "cifar", "parquet") and left:
            return "fault", f"refused, but {left[0]} was left"
        if given.how == "whole":
            return "fault", f"a whole file was refused: {lines[0] if lines else ''}"
        if len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable() or len(lines[0]) > 1500:
            return "fault", f"{len(lines)} lines: {errors[:300]!r}"
        # Settings that the data or each other do not suit may come from the command line too.
        names = (*Path(given.target).parts, "the weights are so large")
        names += ("batch_size", "epochs") if given.kind == "recipe" else ()
        if not any(name in lines[0] for name in names):
            return "fault", f"the line does not name the file: {lines[0]}"
        return "refused", lines[0]
    if lines:
        return "fault", f"accepted with words on the standard error: {lines[0][:300]!r}"
    if " nan" in out:
        return "fault", f"accepted, and the result is no number: {out[-100:]!r}"
    if checked(given) and (folder / "digest.txt").read_text() != expected[given.kind, given.target]:
        if given.kind == "beton" and not _has_checksums(given.files["data/dataset.json"]):
            return "unnoticed", "the description holds no checksum of the betons"
        return "fault", "damage that a checksum shows was accepted"
    return "accepted", ""


def _has_checksums(description: bytes) -> bool:
    return bool(json.loads(description).get("sha256"))


def run_all(
    numbers: Sequence[int],
    make: Callable[[int], Input],
    home: Path,
    expected: dict[tuple[str, str], str],
    *,
    jobs: int,
    seconds: float,
    report: Callable[[int, Input, Path, str, str], None],
) -> None:
    """Run the inputs, ``jobs`` at a time, and report each."""
    waiting, running = list(reversed(numbers)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number = waiting.pop()
                given, folder = make(number), home / f"input-{number}"
                for name, data in given.files.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(data)
                pid = child(lambda given=given: work(given, home), folder)
                running[pid] = number, given, folder, time.monotonic() + seconds
            time.sleep(0.005)
            for pid, (number, given, folder, end) in list(running.items()):
                ended, code = os.waitpid(pid, os.WNOHANG)
                if not ended and time.monotonic() < end:
                    continue
                status = os.waitstatus_to_exitcode(code) if ended else None
                if not ended:
                    _end(pid)
                del running[pid]
                report(number, given, folder, *judge(given, folder, status, expected))
                shutil.rmtree(folder)
    finally:
        for pid in running:  # none, unless this was interrupted
            _end(pid)


def _end(pid: int) -> None:
    """End a child and what it has begun, all of which is in one group."""
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def expectations(samples: dict[str, list[Sample]], home: Path) -> dict[tuple[str, str], str]:
    """The digest of each whole sample, by kind and file."""
    found = {}
    os.chdir(home)
    for kind, each in samples.items():
        for sample in each:
            for target in sample.targets:
                if kind in COVERED or target.endswith(".png"):
                    for name, data in sample.files.items():
                        Path(name).parent.mkdir(exist_ok=True)
                        Path(name).write_bytes(data)
                    if kind in ("tar", "tar.gz", "zip"):
                        converted(target, "out", workers=1, log=lambda line: None)
                    found[kind, target] = content(kind, target)
                    shutil.rmtree("out", ignore_errors=True)
    return found


def print_table(found: dict[str, Counter[str]], seconds: float) -> None:
    """A row a kind, and the sum."""
    total: Counter[str] = sum(found.values(), Counter())
    print(f"\n| {'kind':<13}| inputs | refused in one line | accepted | no checksum shows it | faults |")
    print("|---|---|---|---|---|---|")
    for kind, counts in (*((kind, counts) for kind, counts in found.items() if counts), ("all", total)):
        numbers = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        print(f"| {kind:<13}| {sum(counts.values())} | {numbers} |")
    print(f"\n{sum(total.values())} inputs in {seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    kinds = list(STRUCTURAL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=1000, metavar="N", help="inputs (default 1,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=int, metavar="K", help="only input K, and show what it ends with")
    parser.add_argument("--kind", choices=kinds, action="append", help="only these of the N inputs")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz-faults"), help="folder for inputs with a fault")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="inputs at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of an input")
    parser.add_argument("--verbose", action="store_true", help="a line for each input")
    options = parser.parse_args(argv)
    keep = options.keep.absolute()
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended and the folder is removed
    found: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        home = Path(name)
        null = os.open(os.devnull, os.O_WRONLY)
        shown = os.dup(1)
        os.dup2(null, 1)  # what the commands say about whole files
        samples = make_samples(home)
        evaluate.main([str(home / "run"), "--data", str(home / "data"), *CPU])  # compiles FFCV's loader
        expected = expectations(samples, home)
        os.dup2(shown, 1)

        def report(number: int, given: Input, folder: Path, outcome: str, why: str) -> None:
            if given.how != "whole" or outcome == "fault":
                found[given.kind][outcome] += 1
            words = f"input {number}, {given.target}, {given.how}: {outcome} {why}"
            if outcome == "fault":
                kept = keep / f"seed-{options.seed}-input-{number}"
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"{words}\n  kept in {kept}", flush=True)
            elif options.verbose or options.input is not None:
                print(words, flush=True)

        numbers = range(-len(whole_samples(samples)), options.count) if options.input is None else [options.input]
        wanted = options.kind or kinds
        run_all(
            [number for number in numbers if number < 0 or kinds[number % len(kinds)] in wanted],
            lambda number: make_input(samples, kinds, options.seed, number),
            home,
            expected,
            jobs=options.jobs,
            seconds=options.seconds,
            report=report,
        )
    print_table(found, time.monotonic() - started)
    return 1 if any(counts["fault"] for counts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
