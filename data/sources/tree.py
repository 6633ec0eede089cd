"""A common view of a folder, an archive or a single file: relative names and their contents."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rsengine.data.errors import DataError
from rsengine.data.sources.archives import Blob, Spool, file_digest, is_archive, unpack
from rsengine.data.sources.images import is_picture

SPECIAL = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # what Windows and macOS leave behind


@dataclass(frozen=True, eq=False)
class Tree:
    """The visible files of a source.

    Attributes:
        root: the folder, archive or file.
        kind: "folder", "archive" or "file".
        files: name relative to the root, with forward slashes, -> content; sorted by name.
        folders: names of all folders, empty ones included, without the root itself.
        hidden: names of the outermost folders that are left out for a dot at their beginning, and hold pictures.
    """

    root: Path
    kind: str
    files: dict[str, Blob]
    folders: frozenset[str]
    hidden: tuple[str, ...] = ()

    def where(self, name: str) -> str:
        """A file of the tree as the user would name it."""
        return str(self.root / name) if self.kind == "folder" else f"{self.root}: {name}"

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return self.files[name].read()

    def below(self, folder: str) -> Tree:
        """The part of the tree inside `folder`, "" for all of it; names keep their full length."""
        if not folder:
            return self
        prefix = folder + "/"
        return Tree(
            self.root,
            self.kind,
            {name: blob for name, blob in self.files.items() if name.startswith(prefix)},
            frozenset(name for name in self.folders if name.startswith(prefix)),
        )

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Full names of the files and of the folders directly inside `folder`, sorted."""
        prefix = folder + "/" if folder else ""
        files = [n for n in self.files if n.startswith(prefix) and "/" not in n[len(prefix) :]]
        folders = [n for n in self.folders if n.startswith(prefix) and "/" not in n[len(prefix) :]]
        return files, sorted(folders)

    def checksum(self, names: Iterable[str]) -> str:
        """sha256 of the source: of the archive or file itself, or of the list of the checksums of these files."""
        if self.kind != "folder":
            return file_digest(self.root, "sha256")
        return digest_of_list((name, hashlib.sha256(self.read(name)).digest()) for name in names)


def digest_of_list(digests: Iterable[tuple[str, bytes]]) -> str:
    """sha256 of the lines "<sha256>  <name>\\n", sorted by name."""
    total = hashlib.sha256()
    for name, digest in sorted(digests):
        total.update(digest.hex().encode() + b"  " + os.fsencode(name) + b"\n")
    return total.hexdigest()


def open_tree(source: Path, scratch: Path) -> Tree:
    """Look at a source; an archive is unpacked into one file in `scratch`.

    Raises:
        DataError: there is no such file or folder, or the archive is bad.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; check the path")
    if source.is_dir():
        files, folders = walk(source)
        blobs = {name: Blob(path) for name, path in files.items()}
        return replace(_visible(source, "folder", blobs, folders), hidden=_hidden_folders(source, folders))
    if not source.is_file():
        raise DataError(f"{source}: neither a file nor a folder; give an archive or a folder")
    if not is_archive(source):
        return Tree(source, "file", {source.name: Blob(str(source))}, frozenset())
    with Spool(scratch / "spool") as spool:
        files, folders = unpack(source, spool)
    hidden = {folder for name in files if is_picture(name) and (folder := _hidden_part(name))}
    return replace(_visible(source, "archive", files, folders), hidden=tuple(sorted(hidden)))


def is_hidden(name: str) -> bool:
    """Whether a file is not meant for people: .DS_Store, ._x, Thumbs.db, and all in such folders."""
    return any(part.startswith(".") or part.lower() in IGNORED for part in name.split("/"))


def _hidden_part(name: str) -> str:
    """The outermost folder above the file `name` that a dot hides; "" if none does, or if more hides the file."""
    parts = name.split("/")
    dots = [place for place, part in enumerate(parts[:-1]) if part.startswith(".")]
    rest = [part for place, part in enumerate(parts) if place not in dots]
    return "" if not dots or is_hidden("/".join(rest)) else "/".join(parts[: dots[0] + 1])


def _hidden_folders(root: Path, folders: set[str]) -> tuple[str, ...]:
    """The folders directly in the root or in `folders` that a dot hides, and that hold pictures."""
    found = []
    for parent in sorted({"", *folders}):
        for entry in os.scandir(root / parent):
            if entry.name.startswith(".") and entry.is_dir():
                name = f"{parent}/{entry.name}" if parent else entry.name
                inside = (f"{name}/{file}" for _, _, files in os.walk(entry.path) for file in files)
                if any(is_picture(each) and _hidden_part(each) for each in inside):
                    found.append(name)
    return tuple(found)


def walk(root: Path) -> tuple[dict[str, str], set[str]]:
    """What a conversion of the folder `root` reads. Links are followed, since people link classes together.

    Returns:
        relative name -> path of the files, and the relative names of the folders, without those that are hidden.

    Raises:
        DataError: a folder that cannot be read; a link to a folder above; a pipe, a socket or a device.
    """
    files: dict[str, str] = {}
    folders: set[str] = set()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; check its permissions") from error

    ancestors: dict[str, set[tuple[int, int]]] = {str(root): set()}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        above = ancestors.pop(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # following it would never end
            raise DataError(f"{folder}: a link to a folder that contains it; remove the link")
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        for name in subfolders:
            ancestors[os.path.join(folder, name)] = above | {here}
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative + "/"
        if prefix:
            folders.add(relative)
        for name in names:
            if not is_hidden(name):
                files[prefix + name] = path = os.path.join(folder, name)
                _refuse_special(path)
    return files, folders


def _refuse_special(path: str) -> None:
    """Raise DataError for what is no file: reading a pipe would wait for ever, and a device may have no end."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except OSError:
        return  # a link that leads nowhere: whoever reads the file says so
    if kind in SPECIAL:
        raise DataError(f"{path}: a {SPECIAL[kind]}, not a file; remove it")


def _visible(root: Path, kind: str, files: dict[str, Blob], folders: set[str]) -> Tree:
    shown = {name: files[name] for name in sorted(files) if not is_hidden(name)}
    every = {name for name in folders if name and not is_hidden(name)}
    for name in shown:  # archives need not list the folders
        while "/" in name:
            name = name.rpartition("/")[0]
            if name in every:
                break
            every.add(name)
    return Tree(root, kind, shown, frozenset(every))
