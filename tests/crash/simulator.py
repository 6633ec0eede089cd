"""What a disk may hold after a crash, from a record of the operations that went before.

The model is that of Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), at its weakest:

- What was written to a file is sure to be there once the file has been synced. Before, any of the writes may be there
  or not; a file may have grown without the data, and then holds zeros; the last write may be there in part.
- Names (created, renamed, removed, exchanged) are sure once the folder that holds them has been synced; a synced file
  does not have a name by that alone. Before, any of the changes may be there or not, but each as a whole, and none
  without those before it to the same name.
- A process that is killed loses nothing that it handed over, except that its last write may be there in part.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST_SUBSETS = 128  # of unsynced names at one moment; of more, some are drawn

Tree = dict[str, bytes | None]  # by path: the content of a file, None for a folder
Name = tuple[int, str]  # a folder and a name in it


@dataclass(frozen=True)
class Operation:
    """One line of a record. Paths are relative to the root; "" is the root."""

    number: int
    kind: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = field(default=b"", repr=False)


def read_record(path: Path, root: Path) -> list[Operation]:
    """What the recorder wrote."""
    text, found, at = path.read_bytes(), [], 0

    def relative(name: bytes) -> str:
        return name.decode(errors="surrogateescape").removeprefix(str(root)).strip("/") if name else ""

    while at < len(text):
        end = text.index(b"\n", at)
        number, kind, offset, length, first, second = text[at:end].split(b"\t")
        data = text[end + 1 : end + 1 + int(length)]
        at = end + 2 + int(length)
        found.append(Operation(int(number), kind.decode(), relative(first), relative(second), int(offset), data))
    return found


def joined(operations: Iterable[Operation]) -> list[Operation]:
    """The operations with writes that go on where the one before ended made one: a part of it may be there as well."""
    found: list[Operation] = []
    for each in operations:
        last = found[-1] if found else None
        goes_on = last and each.kind == last.kind == "write" and each.path == last.path
        if goes_on and each.offset == last.offset + len(last.data):
            found[-1] = Operation(last.number, "write", last.path, "", last.offset, last.data + each.data)
        else:
            found.append(each)
    return found


@dataclass(frozen=True)
class _Change:
    """A change of names: each gets another file or folder, or none."""

    names: tuple[tuple[Name, int | None], ...]


@dataclass
class _View:
    """Folders and files by number; folder 0 is the root."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytes] = field(default_factory=dict)

    def apply(self, change: _Change) -> None:
        for (folder, name), number in change.names:
            if number is None:
                self.folders[folder].pop(name, None)
            else:
                self.folders[folder][name] = number

    def copy(self) -> _View:
        return _View({number: dict(names) for number, names in self.folders.items()}, dict(self.files))

    def tree(self) -> Tree:
        found: Tree = {}

        def visit(folder: int, path: str) -> None:
            for name, number in self.folders[folder].items():
                if number in self.folders:
                    found[path + name] = None
                    visit(number, f"{path}{name}/")
                else:
                    found[path + name] = self.files[number]

        visit(0, "")
        return found


class Disk:
    """A folder whose operations are followed one by one.

    Args:
        tree: what is there, synced, at the beginning.
    """

    def __init__(self, tree: Tree | None = None) -> None:
        self._next = itertools.count(1)
        self.now, self.durable = _View(), _View()
        self.names: list[_Change] = []  # that are not synced, in their order
        self.data: dict[int, list[Operation]] = {}  # by file, what is not synced
        self.last: tuple[int, Operation] | None = None  # a write that may be there in part
        self.variants: dict[int, list[bytes]] = {}  # by file, what it may hold of this; made when it is asked for
        for path, content in sorted((tree or {}).items()):
            folder, name = self._find(path)
            number = next(self._next)
            for view in (self.now, self.durable):
                view.folders[folder][name] = number
                if content is None:
                    view.folders[number] = {}
                else:
                    view.files[number] = content

    def _find(self, path: str) -> Name:
        folder = 0
        *above, name = path.split("/")
        for each in above:
            folder = self.now.folders[folder][each]
        return folder, name

    def _number(self, path: str) -> int | None:
        if not path:
            return 0
        try:
            folder, name = self._find(path)
            return self.now.folders[folder].get(name)
        except KeyError:
            return None

    def follow(self, operation: Operation) -> None:
        """Let an operation happen."""
        kind, path = operation.kind, operation.path
        self.last = None
        if kind == "sync":
            self._sync(self._number(path))
        elif kind in ("write", "truncate", "content"):
            number = self._number(path)
            if number is not None:  # otherwise a file without a name, which no crash brings back
                self._write(number, operation)
        elif kind in ("create", "mkdir"):
            number = next(self._next)
            for view in (self.now, self.durable):
                if kind == "mkdir":
                    view.folders[number] = {}
                else:
                    view.files[number] = b""
            self._change((self._find(path), number))
        elif kind in ("unlink", "rmdir"):
            self._change((self._find(path), None))
        elif kind == "rename":
            self._change((self._find(path), None), (self._find(operation.other), self._number(path)))
        elif kind == "exchange":
            a, b = path, operation.other
            self._change((self._find(a), self._number(b)), (self._find(b), self._number(a)))
        else:
            raise AssertionError(f"unknown operation {kind}")

    def _change(self, *names: tuple[Name, int | None]) -> None:
        change = _Change(names)
        self.now.apply(change)
        self.names.append(change)

    def _write(self, number: int, operation: Operation) -> None:
        before = self.now.files[number]
        if operation.kind == "content" and operation.data == before:
            return
        self.now.files[number] = _written(before, operation)
        self.data.setdefault(number, []).append(operation)
        self.variants.pop(number, None)
        if operation.kind == "write":
            self.last = number, operation

    def _sync(self, number: int | None) -> None:
        if number in self.now.folders:
            chosen = {i for i, change in enumerate(self.names) if any(name[0] == number for name, _ in change.names)}
            for i in sorted(self._closed(chosen)):
                self.durable.apply(self.names[i])
            self.names = [change for i, change in enumerate(self.names) if i not in self._closed(chosen)]
        elif number is not None:
            self.durable.files[number] = self.now.files[number]
            self.data.pop(number, None)
            self.variants.pop(number, None)

    def _closed(self, chosen: set[int]) -> set[int]:
        """The changes chosen, with all before them to the same names."""
        found, open_names = set(), set()
        for i in reversed(range(len(self.names))):
            names = {name for name, _ in self.names[i].names}
            if i in chosen or names & open_names:
                found.add(i)
                open_names |= names
        return found

    def after_kill(self) -> Iterator[Tree]:
        """What is there if the process is killed now."""
        yield self.now.tree()
        if self.last is not None:
            number, operation = self.last
            view = self.now.copy()
            *before, _ = self.data[number]
            view.files[number] = _contents(self.durable.files[number], [*before, _half(operation)])
            yield view.tree()

    def after_power_cut(self, rng: random.Random) -> Iterator[Tree]:
        """What may be there if the machine loses power now."""
        for number in self.data.keys() - self.variants.keys():
            self.variants[number] = _variants(self.durable.files[number], self.data[number])
        for subset in self._subsets(rng):
            view = self.durable.copy()
            for i in sorted(subset):
                view.apply(self.names[i])
            for which in (0, 1):  # nothing of what is not synced, and all of it
                plain = {number: contents[which] for number, contents in self.variants.items()}
                view.files.update(plain)
                yield view.tree()
                for number, contents in self.variants.items():
                    for content in contents[2:]:
                        view.files[number] = content
                        yield view.tree()
                    view.files[number] = plain[number]

    def _subsets(self, rng: random.Random) -> list[set[int]]:
        n = len(self.names)
        if 2**n <= MOST_SUBSETS:
            chosen = [{i for i in range(n) if bits >> i & 1} for bits in range(2**n)]
        else:
            every = set(range(n))
            chosen = [set(range(i)) for i in range(n + 1)] + [{i} for i in range(n)] + [every - {i} for i in range(n)]
            chosen += [{i for i in range(n) if rng.random() < 0.5} for _ in range(MOST_SUBSETS - len(chosen))]
        return [set(each) for each in {frozenset(self._closed(each)) for each in chosen}]


def _written(content: bytes, operation: Operation) -> bytes:
    if operation.kind == "content":
        return operation.data
    end = operation.offset if operation.kind == "truncate" else operation.offset + len(operation.data)
    content = content.ljust(operation.offset, b"\0")
    if operation.kind == "truncate":
        return content[:end]
    return content[: operation.offset] + operation.data + content[end:]


def _contents(content: bytes, operations: Iterable[Operation]) -> bytes:
    for each in operations:
        content = _written(content, each)
    return content


def _half(operation: Operation) -> Operation:
    data = operation.data[: len(operation.data) // 2]
    return Operation(operation.number, operation.kind, operation.path, "", operation.offset, data)


def _variants(durable: bytes, pending: list[Operation]) -> list[bytes]:
    """What a file may hold of writes that are not synced: nothing of them, all, and some of what lies between."""
    whole = _contents(durable, pending)
    found = [durable, whole]
    found.append(durable[: len(whole)].ljust(len(whole), b"\0"))  # it has grown, without the data
    if len(pending) > 1:
        found.append(_contents(durable, pending[: len(pending) // 2]))
        found.append(_contents(durable, pending[1:]))  # the first is lost
        found.append(_contents(durable, pending[:-1]))
    found.append(_contents(durable, [*pending[:-1], _half(pending[-1])]))
    return found[:2] + [each for each in dict.fromkeys(found[2:]) if each not in found[:2]]


def crashes(operations: list[Operation], before: Tree | None = None, seed: int = 0) -> Iterator[tuple[int, Tree]]:
    """Each different state that a crash may leave, with the number of operations that had happened, again for each."""
    disk, rng = Disk(before), random.Random(seed)
    for i in range(len(operations) + 1):
        if i:
            disk.follow(operations[i - 1])
        seen = set()
        for tree in itertools.chain(disk.after_kill(), disk.after_power_cut(rng)):
            if (key := key_of(tree)) not in seen:
                seen.add(key)
                yield i, tree


def kills(operations: list[Operation], before: Tree | None = None) -> Iterator[tuple[int, Tree]]:
    """What is there after each operation, if the process is killed and the machine goes on."""
    disk = Disk(before)
    for i, each in enumerate(operations, start=1):
        disk.follow(each)
        yield i, disk.now.tree()


def key_of(tree: Tree) -> frozenset[tuple[str, bytes | None]]:
    return frozenset(tree.items())


def result_of(operations: list[Operation], before: Tree | None = None) -> Tree:
    """What is there after all operations."""
    disk = Disk(before)
    for each in operations:
        disk.follow(each)
    return disk.now.tree()


def tree_of(folder: Path) -> Tree:
    """What is in a real folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def build(tree: Tree, folder: Path) -> None:
    """Make a real folder of a tree."""
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
