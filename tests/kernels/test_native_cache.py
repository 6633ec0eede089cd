"""The compiled passes are loaded only as they were written, and from where nobody else can write."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rsengine.kernels.native import build, library

SOMEBODY = 54321  # a user number that is neither root's nor ours


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, with a folder for temporary files that has to be empty again in the end."""
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "temporary").mkdir()
    yield tmp_path / "cache"
    assert os.listdir(tmp_path / "temporary") == []


def load():
    return library.load.__wrapped__()


def compiled(cache):
    """The path of the library, compiled into the cache."""
    assert load()[0] is not None
    (path,) = (cache / "native").iterdir()
    return path


@pytest.fixture
def compilations(monkeypatch):
    """The commands that are run to compile, not those that ask for the version."""
    commands, plain = [], build._run

    def counted(command, folder=None):
        commands.extend([command] if folder else [])
        return plain(command, folder)

    monkeypatch.setattr(build, "_run", counted)
    return commands


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros in it": lambda content: content[:8192] + bytes(4096) + content[12288:],
    "zeros": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_library_is_compiled_again(cache, compilations, name):
    """In a process of its own that loads it: it used to be ended by SIGBUS."""
    path = compiled(cache)
    content = path.read_bytes()
    path.unlink()  # it is mapped here
    path.write_bytes(DAMAGE[name](content))
    code = "from rsengine.kernels import explain; print(explain('batch_norm', 'cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("batch_norm: native on cpu"), done
    (again,) = (cache / "native").iterdir()
    assert again.name == build._name(again.name.split("-")[1], again.read_bytes())
    assert load()[0] is not None and len(compilations) == 1


def test_it_is_whole_and_synced_before_it_has_its_name(cache, monkeypatch):
    synced, replace = [], os.replace
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or plain(file))

    def checked(source, target):
        assert synced == [os.path.getsize(source)] and os.path.getsize(source) > 10_000
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    compiled(cache)
    assert len(synced) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_let_others_read_and_nobody_else_write(cache, umask, compilations):
    before = os.umask(umask)
    try:
        path = compiled(cache)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644 and path.parent.stat().st_mode & 0o777 == 0o755
    assert load()[0] is not None and len(compilations) == 1


@pytest.mark.parametrize(
    ("where", "mode", "says"),
    [(".", 0o777, "everybody can write to"), ("native", 0o777, "others can write to"), ("native", 0o775, "others can")],
    ids=["cache of everybody", "folder of everybody", "folder of the group"],
)
def test_nothing_is_loaded_from_a_folder_that_others_can_write_to(cache, compilations, where, mode, says):
    path = compiled(cache)
    path.unlink()
    path.write_bytes(b"planted")
    (cache / where).chmod(mode)
    found, reason = load()
    assert found is not None and len(compilations) == 2
    assert says in reason and "(chmod " in reason and "at the next start" in reason
    assert path.read_bytes() == b"planted"  # left alone, and not loaded


def test_a_library_that_others_can_write_to_is_compiled_again(cache, compilations):
    path = compiled(cache)
    path.chmod(0o666)
    assert load()[0] is not None and len(compilations) == 2
    assert compiled(cache).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("what", ["library", "folder"])
def test_what_belongs_to_another_user_is_not_loaded(cache, compilations, monkeypatch, what):
    path = compiled(cache)
    foreign = path if what == "library" else path.parent
    plain = os.stat

    def stat(each, **options):
        status = plain(each, **options)
        if str(each) != str(foreign):
            return status
        return os.stat_result((*status[:4], SOMEBODY, *status[5:10]))

    monkeypatch.setattr(os, "stat", stat)
    found, reason = load()
    assert found is not None and len(compilations) == 2
    if what == "folder":
        assert f"{path.parent} belongs to another user (number {SOMEBODY})" in reason


def test_a_link_in_the_cache_is_not_followed(cache, compilations, tmp_path):
    path = compiled(cache)
    elsewhere = path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(elsewhere)
    assert load()[0] is not None and len(compilations) == 2 and not path.is_symlink()


def test_a_cache_that_cannot_be_made_is_said_and_does_without(cache, tmp_path):
    cache.write_text("a file")
    found, reason = load()
    assert found is not None and f"{cache / 'native'} cannot be used" in reason


def test_a_full_disk_is_said_and_leaves_nothing(cache, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found, reason = load()
    assert found is not None and "cannot be kept" in reason and "No space left on device" in reason
    assert os.listdir(cache / "native") == []


def test_other_options_of_the_compiler_make_another_library(cache, monkeypatch):
    compiled(cache)
    monkeypatch.setenv("CC", "cc -fno-tree-vectorize")
    load()
    assert len(os.listdir(cache / "native")) == 2


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "text", ["sleep 100", '[ "$1" = --version ] || { sleep 100 & wait; }'], ids=["asked", "at work"]
)
def test_a_compiler_that_hangs_is_ended_with_all_it_started(cache, monkeypatch, tmp_path, text):
    monkeypatch.setenv("CC", script(tmp_path / "slow-cc", text))
    monkeypatch.setattr(build, "LIMIT_SECONDS", 0.3)
    begin = time.monotonic()
    found, reason = load()
    assert found is None and "has not answered within 0.3 seconds and was ended" in reason
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("echo nonsense > passes.so; for last; do :; done; echo nonsense > $last", "cannot be kept or loaded"),
        ("exit 0", "cannot be kept or loaded"),
        ("kill -9 $$", "exit status -9"),
        (r"printf 'error: \377\n' >&2; exit 1", "error: "),
        (
            '[ "$1" = --version ] || exec cc -shared -x c /dev/null -o "$(for last; do :; done; echo $last)"',
            "no function",
        ),
    ],
    ids=["makes nonsense", "makes nothing", "is killed", "speaks another language", "makes an empty library"],
)
def test_a_compiler_that_fails_is_a_reason(cache, monkeypatch, tmp_path, text, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CC", script(tmp_path / "cc", text))
    found, reason = load()
    assert found is None and says in reason


def test_cc_that_is_no_command_is_a_reason(cache, monkeypatch):
    monkeypatch.setenv("CC", "gcc 'unfinished")
    assert "CC cannot be read as a command" in load()[1]


def test_what_a_killed_process_left_is_removed(cache, dead_pid):
    path = compiled(cache)
    left = [path.with_name(f".passes-0123.{pid}.tmp") for pid in (dead_pid, os.getppid())]
    folders = [Path(tempfile.gettempdir()) / f".rsengine-native-{pid}-x1" for pid in (dead_pid, os.getppid())]
    for each in left:
        each.write_text("half")
    for each in folders:
        each.mkdir()
    path.unlink()
    load()
    assert [each.exists() for each in left] == [False, True]  # of the living: it stays
    assert [each.exists() for each in folders] == [False, True]
    folders[1].rmdir()
