"""What is read of the processors, from listings of several kinds; and who reads it."""

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
        try:
            busy.stdout.readline()
            found = processor.wanted_by_others()
        finally:
            busy.kill()
    assert found >= 1


def test_the_time_that_others_compute_is_what_all_do_without_this_process(monkeypatch, tmp_path):
    file, clock = tmp_path / "stat", {"monotonic": 10.0, "process_time": 3.0}
    monkeypatch.setattr(processor, "STATISTICS", file)
    monkeypatch.setattr(processor.os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    monkeypatch.setattr(processor, "usable_cpus", lambda: {0, 2})
    for name in clock:
        monkeypatch.setattr(processor.time, name, lambda name=name: clock[name])
    others_lines = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu1 {0} {0} {0} 0 0 0 0 0 0 0\nctxt 5\n"
    file.write_text(others_lines.format(1) + "cpu0 900 10 100 900 70 3 4 9 0 0\ncpu2 100 0 100 0 0 0 0 0 0 0\n")
    others = processor.OtherWork()  # below 4 s of computing, and of idleness
    file.write_text(others_lines.format(800) + "cpu0 1000 20 180 1300 99 8 9 99 0 0\ncpu2 300 0 100 0 0 0 0 0 0 0\n")
    clock |= {"monotonic": 12.0, "process_time": 4.0}
    assert others.used() == pytest.approx(1.5)
    clock |= {"monotonic": 13.0}
    assert others.used() == 0  # since then nobody has
    monkeypatch.setattr(processor, "STATISTICS", tmp_path / "none")
    assert processor.OtherWork().used() == 0


def test_a_process_that_computes_is_other_work():
    others = processor.OtherWork()
    if not others.last[1]:
        pytest.skip("the system does not say what processes have computed")
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    begun, used = others.last[0], others.used()
    assert used * (others.last[0] - begun) > 0.25
