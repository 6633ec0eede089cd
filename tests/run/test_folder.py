"""Run folders: one run each, found by their recipe's name and no other's, written by one process at a time."""

import datetime
import errno
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rsengine.run import folder as module
from rsengine.run.files import WriteError
from rsengine.run.folder import FolderError, latest_run, locked, make_run_folder

NOON = datetime.datetime(2030, 1, 2, 12)
HOLDER = """
import sys
from pathlib import Path
from rsengine.run.folder import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The current folder, and a way to leave a run in it as training would."""
    monkeypatch.chdir(tmp_path)

    def leave(folder, name=None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint.pt").touch()
        if name is not None:
            (folder / "recipe.toml").write_text(f'name = "{name}"\n')
        return folder

    return leave


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("recipe", ["name = " + "[" * 5000, "name = ", 'name = "' + "x" * 70_000])
def test_a_recipe_that_cannot_be_read_hides_no_run(runs, recipe):
    folder = runs("runs/toy-20300102-120000")
    (folder / "recipe.toml").write_text(recipe)
    assert latest_run("toy") == folder


def test_runs_of_one_second_get_a_folder_each(runs):
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: make_run_folder("toy", NOON), range(12)))
    stem = "runs/toy-20300102-120000"
    assert sorted(map(str, folders)) == sorted([stem, *(f"{stem}-{i}" for i in range(2, 13))])


def test_the_latest_is_the_last_made_with_a_checkpoint(runs):
    for _ in range(11):
        made = runs(make_run_folder("toy", NOON))
    make_run_folder("toy", NOON)  # no checkpoint yet
    assert made.name.endswith("-11") and latest_run("toy") == made
    later = runs(make_run_folder("toy", NOON + datetime.timedelta(seconds=1)))
    assert latest_run("toy") == later


@pytest.mark.parametrize("name", ["a[b", "[!a]", "*", "a?", "../a", "a/b", "/a", "ä ö", "a\nb", "a" * 300, "-", ""])
def test_a_run_is_found_whatever_its_name(runs, name):
    others = [runs(make_run_folder(other, NOON), other) for other in ("a", "ab", "aab")]
    mine = runs(make_run_folder(name, NOON))
    assert mine.parent == Path("runs") and mine not in others
    assert latest_run(name) == mine


def test_no_run_of_another_recipe_is_taken(runs):
    runs(make_run_folder("speedrun-94", NOON), "speedrun-94")
    runs(make_run_folder("a-b", NOON), "a-b")
    runs("runs/speedrun-mine")
    for name in ("speedrun", "a/b", "speedrun-94-2", "spe*"):
        with pytest.raises(FolderError, match=re.escape(f"no run of recipe {name} with a checkpoint under runs/")):
            latest_run(name)


def test_a_folder_that_is_held_is_refused_and_the_holder_named(tmp_path, holder):
    words = rf"process {holder.pid} on .* is writing this run; wait until it ends, or name another folder with --out"
    with pytest.raises(FolderError, match=words), locked(tmp_path, print):
        raise AssertionError("held twice")
    holder.communicate("")
    with locked(tmp_path, print):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_the_lock_dies_with_its_process(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path, print):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    code = HOLDER.replace(
        '    print("held", flush=True)',
        "    import os, time\n    if os.fork() == 0:\n        os.close(1)\n"
        "        time.sleep(60)\n        os._exit(0)\n"
        '    print("held", flush=True)',
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            process.kill()
            process.wait()
            with locked(tmp_path, print):
                pass
        finally:
            os.killpg(process.pid, 9)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_said_in_a_line(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.fcntl, "lockf", refuse)
    said = []
    with locked(tmp_path, said.append):
        assert said == [f"run: no lock on {tmp_path} ({os.strerror(number)}); start no other run there meanwhile"]
    assert not list(tmp_path.iterdir())


def test_a_system_without_locks_runs_too(tmp_path):
    code = (
        "import sys, rsengine.run.files; sys.modules['fcntl'] = None\n"
        "from pathlib import Path; from rsengine.run.folder import locked\n"
        "with locked(Path(sys.argv[1]), print): pass"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"run: no lock on {tmp_path} (this system has none)")


def test_the_names_of_new_folders_are_synced_up_to_the_first_that_was_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module, "sync", lambda path: synced.append(Path(path)))
    module.make_folder(tmp_path / "a" / "b" / "run")
    assert sorted(synced) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    module.make_folder(tmp_path / "a" / "b" / "run")
    assert synced == [tmp_path / "a" / "b"]  # a killed process may have made it and not synced it
    monkeypatch.chdir(tmp_path)
    synced.clear()
    folder = module.make_run_folder("toy")
    assert (tmp_path / "runs").is_dir() and {path.resolve() for path in synced} == {tmp_path, tmp_path / "runs"}
    assert folder.is_dir()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WriteError, match=f"{path}: cannot be written .*is not a folder; name another"):
            module.make_folder(path)


def test_a_lock_that_cannot_be_made_is_one_line_and_one_that_cannot_be_removed_is_left(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(WriteError, match="cannot be written"), locked(tmp_path, print):
            raise AssertionError
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with locked(tmp_path, print):
            pass
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path, print):  # nobody holds it
        pass
