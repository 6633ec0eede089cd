"""The simulator finds what a crash may leave, by hand and where a write has a known fault."""

import pytest

from tests.crash.simulator import Disk, Operation, crashes, joined, result_of, tree_of

ATOMIC = [
    Operation(1, "create", ".a.tmp"),
    Operation(2, "write", ".a.tmp", "", 0, b"new!"),
    Operation(3, "sync", ".a.tmp"),
    Operation(4, "rename", ".a.tmp", "a"),
    Operation(5, "sync", ""),
]
OLD = {"a": b"old"}


def found(operations, before=OLD, name="a"):
    """By the number of operations done, what may be under a name; None for nothing."""
    result = {}
    for i, tree in crashes(operations, before):
        result.setdefault(i, set()).add(tree.get(name))
    return [result[i] for i in range(len(operations) + 1)]


def test_an_atomic_write_gives_the_old_or_the_new_and_then_the_new():
    assert found(ATOMIC) == [{b"old"}] * 4 + [{b"old", b"new!"}, {b"new!"}]


def test_without_a_sync_of_the_file_anything_may_be_there():
    unsynced = [each for each in ATOMIC if each.number != 3]
    assert found(unsynced)[-1] == {b"", b"\0\0\0\0", b"ne", b"new!"}


def test_without_a_sync_of_the_folder_the_old_may_come_back():
    assert found(ATOMIC[:-1])[-1] == {b"old", b"new!"}


def test_a_new_name_is_lost_though_its_file_is_synced():
    assert found(ATOMIC[:3], before={}, name=".a.tmp")[-1] == {None, b"new!"}


def test_writes_are_lost_one_by_one_and_a_killed_process_loses_none():
    appends = [Operation(i, "write", "log", "", i - 1, b"%d" % i) for i in (1, 2, 3)]
    assert found(appends, {"log": b""}, "log")[-1] == {b"", b"123", b"\0\0\0", b"1", b"\x0023", b"12"}
    disk = Disk({"log": b""})
    for each in appends:
        disk.follow(each)
    assert [tree["log"] for tree in disk.after_kill()] == [b"123", b"12"]


def test_folders_come_with_what_is_in_them_or_not_at_all():
    steps = [
        Operation(1, "mkdir", "new"),
        Operation(2, "create", "new/file"),
        Operation(3, "rename", "new", "out"),
        Operation(4, "sync", "out"),
        Operation(5, "sync", ""),
    ]
    at_end = [sorted(tree) for i, tree in crashes(steps, {}) if i == 3]
    assert sorted(at_end) == [[], ["new"], ["new", "new/file"], ["out"], ["out", "out/file"]]
    assert {tuple(sorted(tree)) for i, tree in crashes(steps, {}) if i == 5} == {("out", "out/file")}


def test_names_that_are_exchanged_change_together():
    steps = [Operation(1, "exchange", "a", "b")]
    trees = [tree for i, tree in crashes(steps, {"a": b"1", "b": b"2"}) if i == 1]
    assert sorted(trees, key=str) == [{"a": b"1", "b": b"2"}, {"a": b"2", "b": b"1"}]


def test_a_removed_file_may_come_back_until_its_folder_is_synced():
    assert found([Operation(1, "unlink", "a"), Operation(2, "sync", "")]) == [{b"old"}, {b"old", None}, {None}]


@pytest.mark.parametrize(
    ("how", "faulty"), [("right", False), ("unsynced", True), ("in place", True)], ids=lambda value: str(value)
)
def test_a_fault_in_a_write_shows_in_what_is_recorded(recorder, tmp_path, how, faulty):
    (tmp_path / "file").write_bytes(b"old" * 100)
    before = tree_of(tmp_path)
    operations = joined(recorder.record("write", tmp_path, how))
    assert result_of(operations, before) == tree_of(tmp_path)
    left = {tree.get("file") for _, tree in crashes(operations, before)}
    assert (left != {b"old" * 100, b"new" * 100}) == faulty


def test_the_recorder_sees_every_way_to_write(recorder, tmp_path):
    operations = recorder.record("ways", tmp_path)
    assert result_of(operations) == tree_of(tmp_path)
    assert {each.kind for each in operations} >= {"mkdir", "create", "write", "content", "truncate", "rename", "rmdir"}
