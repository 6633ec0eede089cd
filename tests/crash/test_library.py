"""Whatever a crash leaves of the cache of compiled code, the next start loads the library as it was made."""

import shutil
import tempfile

import pytest

from rsengine.kernels.native import library
from tests.crash.simulator import build, crashes, joined, key_of, result_of, tree_of


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The content of the library. From here on the compiler copies it, which takes less time than to compile."""
    monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "first"))
    assert library.load.__wrapped__()[0] is not None
    (path,) = (tmp_path / "first" / "native").iterdir()
    compiler = tmp_path / "copying-cc"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || exec cp {path} "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    return path.read_bytes()


def test_a_crash_at_any_moment_leaves_the_library_whole_or_to_be_made_again(recorder, tmp_path, monkeypatch, made):
    before = {"tmp": None}
    build(before, tmp_path / "root")
    operations = joined(recorder.record("library", tmp_path / "root"))
    assert result_of(operations, before) == tree_of(tmp_path / "root")
    seen = set()
    for _, tree in crashes(operations, before):
        if key_of(tree) in seen:
            continue
        seen.add(key_of(tree))
        build(tree, tmp_path / "state")
        monkeypatch.setenv("RSENGINE_CACHE", str(tmp_path / "state" / "cache"))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "state" / "tmp"))
        found, reason = library.load.__wrapped__()
        assert found is not None and "again at the next start" not in reason, (reason, sorted(tree))
        (kept,) = (tmp_path / "state" / "cache" / "native").iterdir()  # and no temporary file
        assert kept.read_bytes() == made
        assert list((tmp_path / "state" / "tmp").iterdir()) == [], sorted(tree)
        shutil.rmtree(tmp_path / "state")
    assert len(seen) > 10
