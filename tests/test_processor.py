"""What is read of the processors, from listings of several kinds; and who reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsengine import device, processor
from rsengine.kernels.native import library

ROOT = Path(__file__).parent.parent
X86 = "processor\t: {}\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 {}\n\n"
ARM = "processor\t: {}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n\n"


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """Replaces the listing by a text."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "LISTING", file)
    return file.write_text


def test_features_are_those_of_every_processor(listed):
    listed(X86.format(0, "avx512_bf16 amx") + X86.format(1, "avx512_bf16"))
    assert processor.features() == {"fpu", "avx2", "avx512_bf16"}
    assert [fields["processor"] for fields in processor.listing()] == ["0", "1"]
    assert device.choose_execution("cpu").reason.startswith("bfloat16 autocast on cpu (automatic: the processor has")


def test_features_of_arm_processors(listed):
    listed(ARM.format(0) + ARM.format(1) + "Hardware\t: Some board\n")
    assert processor.features() == {"fp", "asimd", "bf16"}


def test_a_system_without_a_listing_has_no_known_features(listed):
    assert processor.listing() == [] and processor.features() == set()
    assert "neither AVX512_BF16 nor AMX" in device.choose_execution("cpu").reason


def test_processors_of_other_features_get_their_own_native_code(listed, monkeypatch, tmp_path):
    """A home folder may be shared by machines of several kinds."""
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path))
    names = set()
    for feature in ("avx512_bf16", "amx", "avx512_bf16"):
        listed(X86.format(0, feature))
        library.load.__wrapped__()
        names |= {path.name for path in (tmp_path / "native").iterdir()}
    assert len(names) == 2


def test_nothing_else_reads_the_listing():
    houses = ("rsengine", "kernels", "data", "bench")
    files = {path.resolve() for house in houses for path in (ROOT / house).rglob("*.py")}
    readers = [path.relative_to(ROOT.resolve()) for path in files if "/proc/cpuinfo" in path.read_text()]
    assert readers == [Path("rsengine/processor.py")]


@pytest.fixture
def running(monkeypatch, tmp_path):
    """Says how many threads of the whole system run, at each look."""
    file = tmp_path / "stat"
    monkeypatch.setattr(processor, "STATISTICS", file)
    monkeypatch.setattr(processor, "_running", lambda: 1)
    monkeypatch.setattr(processor.os, "cpu_count", lambda: 2)

    def say(*counts):
        left = list(counts)
        monkeypatch.setattr(
            processor.time, "sleep", lambda _: file.write_text(f"cpu 1 2\nprocs_running {left.pop(0)}\n")
        )

    return say


@pytest.mark.parametrize(
    ("counts", "threads", "expected"),
    [
        ((2, 2, 2, 2, 2), 2, "the machine is busy: 1 other process wants its 2 processors, so that all takes longer"),
        ((4, 3, 5, 9, 3), 1, "the machine is busy: 2 other processes want its 2 processors, so that all takes longer"),
        ((2, 2, 1, 2, 2), 2, ""),  # something short
        ((2, 2, 2, 2, 2), 1, ""),  # there is a processor for it
        ((1, 1, 1, 1, 1), 2, ""),
    ],
)
def test_a_busy_machine_is_noticed(running, counts, threads, expected):
    running(*counts)
    assert processor.is_busy(threads) == expected


def test_a_system_that_does_not_say_is_not_busy(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "STATISTICS", tmp_path / "none")
    assert processor.wanted_by_others() == 0 and processor.is_busy(64) == ""


def test_a_thread_that_ends_while_it_is_counted_does_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "TASKS", tmp_path)
    for number, state in ((1, "R"), (2, "S")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "stat").write_text(f"{number} (a name) R) {state} 1 1\n")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "stat").symlink_to(tmp_path / "gone")
    assert processor._running() == 1


def test_a_busy_process_is_counted():
    """As the system itself counts: more with it than without, on a machine that other tests may use too."""
    if not processor.STATISTICS.exists():
        pytest.skip("the system does not say how many threads run")
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        busy.stdout.readline()
        found = processor.wanted_by_others()
        busy.kill()
    assert found >= 1


@pytest.mark.parametrize(
    ("cores", "counts", "given", "expected"),
    [
        (2, (1, 1, 1), {}, "30000"),
        (4, (3, 1, 2), {}, "30000"),  # something short
        (2, (2, 3, 2), {}, "4000"),
        (5, (1, 1, 1), {}, None),
        (2, (1, 1, 1), {"GOMP_SPINCOUNT": "7"}, "7"),
        (2, (1, 1, 1), {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_how_long_threads_look_before_they_sleep(running, monkeypatch, cores, counts, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    running(*counts)
    monkeypatch.setattr(processor.os, "cpu_count", lambda: cores)
    processor.set_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    os.environ.pop("GOMP_SPINCOUNT", None)


def test_it_is_said_before_pytorch_is_imported():
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys; os.cpu_count = lambda: 2; import rsengine; "
    code += "print(os.environ.get('GOMP_SPINCOUNT'), *sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    count, *modules = said.stdout.split()
    assert count in ("4000", "30000") and "rsengine" in modules and "torch" not in modules
