"""What is read of the processors, from listings of several kinds; and who reads it."""

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
