"""A study on a Ray cluster of two nodes on this machine, of which one dies in the middle."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from rsengine.run.log import RunLog
from rsengine.study import __main__ as study_module
from tests.study.studies import TINY

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
TABLES = ("results.csv", "results.json", "results.md")
TWO = TINY.partition("[variants.wild]")[0]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_a_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    assert study_module.main(["tiny.toml", "--on", "ray", "--out", "out", "--device", "cpu"]) == 2
    assert "--on ray: Ray is not installed; `pip install 'rsengine[ray]'` brings it" in capsys.readouterr().err


def test_another_engine_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        study_module.main(["additive", "--on", "slurm"])
    assert left.value.code == 2 and "expected ray or ray:ADDRESS; got 'slurm'" in capsys.readouterr().err


@needs_ray
def test_no_cluster_at_an_address_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "1")
    (tmp_path / "tiny.toml").write_text(TINY)
    assert study_module.main(["tiny.toml", "--on", "ray:nowhere", "--out", "out", "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --on ray: no cluster at nowhere")


@needs_ray
@pytest.mark.thorough
def test_trials_of_a_node_that_dies_go_on_elsewhere_and_the_tables_are_the_same(tmp_path):
    from ray.cluster_utils import Cluster

    (tmp_path / "tiny.toml").write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def study(*options):
        command = [sys.executable, "-m", "rsengine.study", "tiny.toml", "--device", "cpu", "--epochs", "20", *options]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = study("--out", "ray", "--on", f"ray:{cluster.address}")
        logs = [RunLog(tmp_path / "ray" / "trials" / f"{name}-seed-0") for name in ("plain", "smooth")]
        while not all(log.records("interval") for log in logs):
            assert process.poll() is None
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)
        output = process.communicate(timeout=400)[0]
    finally:
        cluster.shutdown()
    assert process.returncode == 0 and "study: Ray has 2 nodes, with room for 2 trials of 1 cores" in output
    # The trial of the second node was begun twice, the other once.
    said = [(log.path.parent.with_suffix(".log")).read_text() for log in logs]
    assert sorted(words.count("compute: ") for words in said) == [1, 2]
    assert study("--out", "here").wait(400) == 0
    for name in TABLES:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


@needs_ray
@pytest.mark.thorough
def test_a_stopped_study_saves_and_goes_on_without_a_cluster(tmp_path):
    (tmp_path / "tiny.toml").write_text(TWO)

    def study(*options):
        command = [
            sys.executable,
            "-m",
            "rsengine.study",
            "tiny.toml",
            "--device",
            "cpu",
            "--epochs",
            "40",
            "--out",
            "out",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, *options], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE)

    process, log = study("--on", "ray"), RunLog(tmp_path / "out" / "trials" / "plain-seed-0")
    while not log.records("interval"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 130 and "study: plain-seed-0 is stopped, and saved" in output
    assert (log.path.parent / "checkpoint.pt").exists() and not log.path.parent.with_suffix(".json").exists()
    process = study()
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0 and "study: resuming plain-seed-0" in output
