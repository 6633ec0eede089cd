"""What a log says of the machine and the versions."""

import json
import os
import subprocess
import sys

import numpy as np

from rsengine import processor
from rsengine.run import machine


def test_machine_says_what_runs_here_and_is_json():
    here = machine.machine()
    assert set(here) == {"processor", "physical_cores", "logical_cores", "ram_gib", "gpus", "os", "python"}
    assert here["logical_cores"] >= 1
    assert here["physical_cores"] is None or 1 <= here["physical_cores"] <= here["logical_cores"]
    assert here["ram_gib"] is None or here["ram_gib"] > 0.1
    assert here["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert os.uname().nodename not in json.dumps(here)


def test_machine_reads_cpuinfo_of_the_usable_processors_only(monkeypatch, tmp_path):
    block = "processor\t: {}\nmodel name\t: Some CPU @ 2 GHz\nphysical id\t: {}\ncore id\t\t: {}\n"
    # Two sockets of two cores of two threads; core ids repeat on the second socket.
    text = "\n".join(block.format(n, n // 4, n // 2 % 2) for n in range(8))
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "LISTING", tmp_path / "cpuinfo")
    assert machine._processor(set(range(8))) == ("Some CPU @ 2 GHz", 4)
    assert machine._processor({0, 1, 6}) == ("Some CPU @ 2 GHz", 2)
    assert machine._processor({99}) == ("Some CPU @ 2 GHz", None)


def test_versions_are_those_installed_and_nothing_is_imported():
    found = machine.versions()
    assert list(found) == ["torch", "torchvision", "triton", "ffcv", "numba", "numpy", "rsengine"]
    assert found["numpy"] == np.__version__
    code = (
        "import sys; from rsengine.run import machine; machine.versions(); gpus = machine.machine()['gpus']\n"
        "heavy = {'torch', 'torchvision', 'triton', 'ffcv', 'numba', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy and gpus == [], (heavy, gpus)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("numpy", "no-such-package-anywhere"))
    assert machine.versions() == {"numpy": np.__version__, "no-such-package-anywhere": None}
