"""How trials are started, stopped, recorded and refused; a stand-in takes the place of ``rsengine train``."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rsengine.processor import usable_cpus
from rsengine.study import __main__ as study_module
from rsengine.study import manifest as manifest_module
from rsengine.study import measure as measure_module
from rsengine.study.file import StudyError, parse_study
from rsengine.study.manifest import source_version
from rsengine.study.measure import Measurement
from rsengine.study.progress import Progress
from rsengine.study.runner import run_trials
from rsengine.study.trials import Trial
from rsengine.study.workers import Worker, share_out
from tests.run.pages import records, write_log
from tests.study.studies import DATASET, TINY, done, opened, silent

TWO = "seeds = 2\n[variants.a]\n[variants.b]\ntrain.label_smoothing = 0.0\n"
PRINTS = 'import json; print(json.dumps({"test_accuracy": 0.5}))'
WAITS = """
import json, pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Has trials run Python code instead: by their names, or the same for all; it is told a file to touch."""

    def use(code):
        def command(trial, data, device):
            chosen = code.get(trial.name, PRINTS) if isinstance(code, dict) else code
            return [sys.executable, "-c", chosen, str(trial.folder) + ".touched"]

        monkeypatch.setattr(Trial, "command", command)

    return use


def run(folder, workers=1):
    trials = opened(folder, TWO).trials(folder)
    lines = []
    progress = Progress(trials, workers, lines.append, quiet=True)
    stopped = run_trials(trials, Path("data"), "cpu", [Worker()] * workers, "code", progress)
    return {trial.name: trial.outcome() for trial in trials}, lines, stopped


def test_a_trial_with_an_error_is_recorded_and_the_others_go_on(tmp_path, stand_in):
    wild = 'import sys; print("error: the loss is no longer a finite number at step 3", file=sys.stderr); sys.exit(1)'
    stand_in({"a-seed-0": wild, "b-seed-0": "1 / 0", "a-seed-1": "import os; os.kill(os.getpid(), 9)"})
    outcomes, lines, stopped = run(tmp_path)
    assert stopped == 0 and [each.status for each in outcomes.values()] == ["diverged", "failed", "failed", "done"]
    assert outcomes["a-seed-0"].why == "the loss is no longer a finite number at step 3"
    assert outcomes["b-seed-0"].why == "ended with exit status 1: ZeroDivisionError: division by zero"
    assert outcomes["a-seed-1"].why.startswith("ended with signal 9")
    assert outcomes["b-seed-1"].result == {"test_accuracy": 0.5} and outcomes["b-seed-1"].source == "code"
    assert "study: a-seed-0 diverged: the loss is no longer a finite number at step 3; the others go on" in lines


def test_what_has_ended_is_not_run_again_and_what_failed_is(tmp_path, stand_in):
    stand_in({"a-seed-0": "import sys; sys.exit(2)", "b-seed-1": "print('no result')"})
    outcomes, *_ = run(tmp_path)
    assert outcomes["a-seed-0"].why == "ended with exit status 2: it said nothing"
    assert outcomes["b-seed-1"].why.startswith("what it printed is no result: not valid JSON")
    stand_in(PRINTS.replace("0.5", "0.7"))
    outcomes, lines, _ = run(tmp_path)
    assert [each.result["test_accuracy"] for each in outcomes.values()] == [0.7, 0.5, 0.5, 0.7]
    assert lines[0] == "study: 2 of 4 trials have ended before" and len(lines) == 5
    damaged = tmp_path / "trials" / "a-seed-0.json"
    damaged.write_text('{"status": "great"}')
    with pytest.raises(StudyError, match="a-seed-0.json: why: missing; remove it"):
        run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_the_trials_and_no_other_is_begun(tmp_path, stand_in, number):
    stand_in(WAITS)

    def stop():
        touched = [tmp_path / "trials" / f"{name}-seed-0.touched" for name in "ab"]
        while not all(path.exists() for path in touched):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=stop)
    opened(tmp_path, TWO)
    killer.start()
    outcomes, lines, stopped = run(tmp_path, workers=2)
    killer.join()
    assert stopped == number and set(outcomes.values()) == {None}
    assert sum(line.endswith("is stopped, and saved") for line in lines) == 2
    assert not (tmp_path / "trials" / "a-seed-1.touched").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no place to undo it")
def test_a_trial_can_be_stopped_where_signals_are_ignored_or_blocked(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        words = [sys.executable, "-c", WAITS, str(tmp_path / "touched")]
        process = subprocess.Popen(words, **Worker().options())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, before)
    while not (tmp_path / "touched").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (130, -signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of the end of its parent")
def test_the_trial_of_a_killed_study_ends(tmp_path):
    code = (
        "import subprocess, sys\nfrom rsengine.study.workers import Worker\n"
        f"process = subprocess.Popen([sys.executable, '-c', {WAITS!r}, {str(tmp_path / 'touched')!r}], "
        "**Worker().options())\nprint(process.pid, flush=True)\nprocess.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    while not (tmp_path / "touched").exists():
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the trial goes on"
        time.sleep(0.01)
    parent.stdout.close()


def test_a_trial_resumes_where_it_has_a_checkpoint(tmp_path):
    trial = opened(tmp_path, TWO).trials(tmp_path)[1]
    words = trial.command("data", "cpu")
    assert words[1:3] == ["-m", "rsengine.train"] and words[-4:] == [
        *("--recipe", str(tmp_path / "recipes" / "b.toml")),
        *("--seed", "0"),
    ]
    trial.folder.mkdir()
    (trial.folder / "checkpoint.pt").touch()
    assert trial.command("data", "cpu")[-3:] == ["--out", str(trial.folder), "--resume"]


def test_trials_come_seed_by_seed_and_differ_in_their_seeds_alone(tmp_path):
    trials = opened(tmp_path, TWO).trials(tmp_path)
    assert [trial.name for trial in trials] == ["a-seed-0", "b-seed-0", "a-seed-1", "b-seed-1"]
    assert trials[0].recipe.differences(trials[2].recipe) == ["train.seed: 0 against 1"]
    assert trials[0].recipe.differences(trials[1].recipe)[1:] == ["train.label_smoothing: 0.1 against 0.0"]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_the_time_left_is_counted_from_the_epochs_that_are_done(tmp_path):
    manifest = opened(tmp_path, TWO + "[set]\ntrain.epochs = 4\n")
    trials = manifest.trials(tmp_path)
    progress = Progress(trials, 2, silent, quiet=True)
    assert progress.words([trials[0]], []).endswith(
        "0 of 4 trials ended; a-seed-0 at epoch 0.0/4; time left known after the first epoch"
    )
    done(trials[0], 0.8)  # an epoch takes a minute
    write_log(trials[1].folder, records(2))
    words = progress.words([trials[1]], trials[:1])
    assert words == "1 of 4 trials ended; b-seed-0 at epoch 2.0/4; about 5 min 00 s left"  # 2 + 4 + 4 epochs on two


# --- other recipes, data and code -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dataset", "words"),
    [
        (
            TWO.replace("0.0", "0.2"),
            DATASET,
            r"another recipe \(variant b, train.label_smoothing: 0.0 there, here 0.2\)",
        ),
        (TWO + "[variants.c]\n", DATASET, r"other variants \(a, b\) than these \(a, b, c\)"),
        (TWO, replace(DATASET, identity="b" * 64), r"other data \(toy, 900 \+ 300 images, identity aaaaaaaa…\)"),
        ("budget = {epochs = 3}\n" + TWO, DATASET, r"another budget \(budget none there, here epochs = 3\)"),
        ('equal = "time"\n' + TWO, DATASET, "another budget"),
    ],
)
def test_a_folder_with_other_trials_is_refused_in_a_line(tmp_path, text, dataset, words):
    opened(tmp_path, TWO)
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(StudyError, match=words) as caught:
        opened(tmp_path, text, dataset)
    assert "name another folder with --out" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "study.json").read_bytes() == before


def test_other_code_is_refused_unless_it_is_accepted_and_then_told(tmp_path, monkeypatch):
    opened(tmp_path, TWO)
    monkeypatch.setattr(manifest_module, "source_version", lambda: "rsengine 1")
    with pytest.raises(StudyError, match="made with other code .* go on with --accept-code"):
        opened(tmp_path, TWO)
    lines = []
    opened(tmp_path, TWO, accept_code=True, say=lines.append)
    assert len(lines) == 1 and "trials of other code" in lines[0]


def test_seeds_are_added(tmp_path):
    opened(tmp_path, TWO)
    assert opened(tmp_path, TWO.replace("seeds = 2", "seeds = [1, 4]")).study.seeds == (0, 1, 4)
    assert opened(tmp_path, TWO).study.seeds == (0, 1, 4)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "study": {"variants": []}}'])
def test_a_damaged_manifest_is_a_line(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(StudyError, match="study.json: damaged"):
        opened(tmp_path, TWO)


def test_trials_without_a_manifest_are_left_alone(tmp_path):
    (tmp_path / "trials").mkdir()
    with pytest.raises(StudyError, match="has trials/ without a study.json"):
        opened(tmp_path, TWO)


def test_the_folder_of_a_run_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(StudyError, match="is the folder of a run, not of a study; name another one with --out"):
        opened(tmp_path, TWO)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_version_of_the_code_covers_what_trains_and_not_the_studies(monkeypatch, tmp_path):
    package = tmp_path / "rsengine"
    for name in ("trainer.py", "kernels/op.py", "kernels/pass.c", "data/find.py", "study/page.py", "notes.md"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("a")
    monkeypatch.setattr(manifest_module.resources, "files", lambda _: package)
    found = {}
    for name in ("", "trainer.py", "kernels/op.py", "kernels/pass.c", "data/find.py", "study/page.py", "notes.md"):
        if name:
            (package / name).write_text("b")
        source_version.cache_clear()
        found[name] = source_version()
    source_version.cache_clear()
    assert len(set(found.values())) == 5 and found["data/find.py"] == found["study/page.py"] == found["notes.md"]


# --- workers, times and the command -----------------------------------------------------------------------------------


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr("rsengine.study.workers.usable_cpus", lambda: {0, 1, 2, 5, 6})
    assert share_out(1, "cpu") == [Worker()]
    if sys.platform == "linux":
        assert share_out(2, "cpu") == [Worker((0, 1)), Worker((2, 5))]
        assert Worker((2, 5)).options()["env"]["OMP_NUM_THREADS"] == "2"
    with pytest.raises(StudyError, match="--workers 6: expected at most 5, one for each core"):
        share_out(6, "cpu")


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [each.gpu for each in share_out(2, "auto")] == ["0", "1"]
    assert Worker(gpu="1").options()["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [each.gpu for each in share_out(2, "cuda")] == ["3", "5"]
    with pytest.raises(StudyError, match="--workers 3: expected at most 2, one for each GPU"):
        share_out(3, "auto")
    assert [each.gpu for each in share_out(1, "cpu")] == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bind processes to cores")
def test_a_trial_is_bound_to_the_cores_of_its_worker():
    core = min(usable_cpus())
    code = "import os; print(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **Worker((core,)).options())
    assert done.stdout.split() == [f"{{{core}}}", "1"]


def test_recipes_whose_steps_cost_the_same_are_measured_once(monkeypatch):
    measured = []

    def seconds(recipe, data, device, worker):
        measured.append(recipe.name)
        return float(len(measured))

    monkeypatch.setattr(measure_module, "_measured", seconds)
    text = '[variants.a]\n[variants.b]\nschedule.name = "cosine"\n[variants.c]\nmodel.stem_width = 8\n'
    recipes = [variant.recipe for variant in parse_study(text, "x.toml", Path()).variants]
    measurement = Measurement("data", "cpu", Worker(), silent)
    assert measurement.epoch_seconds(recipes) == [1.0, 1.0, 2.0] and measured == ["a", "c"]
    assert measurement.epoch_seconds(recipes[1:]) == [1.0, 2.0] and measured == ["a", "c"]


def test_a_dry_run_lists_the_trials_with_their_times_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    assert study_module.main(["tiny.toml", "--dry-run", "--device", "cpu", "--seeds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["trial"] for row in found["trials"][:4]] == [
        "plain-seed-0",
        "smooth-seed-0",
        "wild-seed-0",
        "plain-seed-1",
    ]
    times = [row["predicted_seconds"] for row in found["trials"]]
    assert all(0 < seconds < 1000 for seconds in times) and sum(times) == pytest.approx(found["predicted_seconds"])
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["addtive"], "addtive: expected one of additive"),
        (["tiny.toml", "--epochs", "3", "--budget-minutes", "3"], "--epochs and --budget-minutes: both say"),
        (["tiny.toml", "--set", "train.epoch=3"], "tiny.toml: train.epoch: no such key; did you mean train.epochs?"),
        (["tiny.toml", "--model", "digts"], "tiny.toml: --recipe digts: expected one of"),
        (["tiny.toml", "--seeds", "x"], "tiny.toml: --seeds x: expected how many"),
        (["tiny.toml", "--workers", "5000"], "--workers 5000: expected at most"),
        (["tiny.toml", "--data", "nowhere"], "nowhere"),
        (["tiny.toml", "--out", "held"], "is writing this run; wait until it ends"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path("held").mkdir()
    code = "import sys, time\nfrom rsengine.run.folder import locked\nfrom pathlib import Path\n"
    code += "with locked(Path('held'), print):\n    print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        assert study_module.main([*arguments, "--device", "cpu"]) == 2
    finally:
        holder.communicate("")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
