"""Checksums and archives: reading bytes from an untrusted source.

No member of an archive ever becomes a file under its own name: the contents are appended to one spool file in the
temporary folder of the conversion, and a member is an offset and a length in it. A hostile name therefore has nowhere
to escape to; it is refused all the same, as are links and devices, because such an archive is damaged or dangerous.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import lzma
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from rsengine.data.errors import DataError

BLOCK = 1 << 20
# An archive may unpack to at most this many times its own size, or to a gibibyte if that is more. Photographs barely
# compress; 60,000 tiny JPEGs in a tar, whose headers do, give a factor of seven.
LARGEST_RATIO, LARGEST_SMALL = 100, 1 << 30
LONGEST_NAME = 4096  # as long as paths may be on Linux
MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# With --dereference alone, tar packs a file that is met a second time as a hard link to the first.
_PACK_FILES = "which is not unpacked; pack the files themselves: tar --dereference --hard-dereference"
_LEAVE_OUT = "not a file; pack the folder without it"
_NOT_UNPACKED = {
    tarfile.SYMTYPE: f"a link, {_PACK_FILES}",
    tarfile.LNKTYPE: f"a hard link, {_PACK_FILES}",
    tarfile.CHRTYPE: f"a device, {_LEAVE_OUT}",
    tarfile.BLKTYPE: f"a device, {_LEAVE_OUT}",
    tarfile.FIFOTYPE: f"a named pipe, {_LEAVE_OUT}",
}
_OTHER = "of a kind that is not unpacked, such as a sparse file; pack the folder without tar --sparse"


class Blob(NamedTuple):
    """A piece of a file: `size` bytes at `offset` of `path`, up to the end of the file when `size` is -1."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes. Raises OSError; DataError when the file has become too short."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size) if self.size >= 0 else file.read()
        if self.size >= 0 and len(data) != self.size:
            raise DataError(f"{self.path}: became shorter during the conversion; run it again")
        return data


class Spool:
    """A file that byte strings are appended to, each remembered as a `Blob`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._file = path.open("xb")

    def append(self, data: bytes) -> Blob:
        """Store `data`; readable after `close`."""
        self._file.write(data)
        blob = Blob(str(self.path), self._size, len(data))
        self._size += len(data)
        return blob

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file's content; `algorithm` is a name hashlib knows."""
    # md5 identifies the published archives here; nothing relies on it being hard to forge.
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_archive(path: Path) -> bool:
    """Whether the file is a tar (plain or compressed with gzip, bzip2 or xz) or a zip, judged by its first bytes."""
    with path.open("rb") as file:
        start = file.read(512)
    return start.startswith((b"PK\x03\x04", b"PK\x05\x06", *MAGIC)) or start[257:262] == b"ustar"


def unpack(path: Path, spool: Spool) -> tuple[dict[str, Blob], set[str]]:
    """Append the regular files of an archive to `spool`.

    Returns:
        name -> Blob of the files, and the names of the folders; names are relative, with forward slashes.

    Raises:
        DataError: damaged or truncated archive; a member that is a link, a device or encrypted, or whose name leaves
            the folder; an archive that unpacks to an absurd size.
    """
    limit = _limit(path.stat().st_size)
    with path.open("rb") as file:
        start = file.read(6)
    with _damage_named(path):
        if start.startswith(b"PK"):
            return _unpack_zip(path, path, spool, limit)
        return _unpack_tar(path, spool, limit, start)


def unpack_inside(zips: Mapping[str, Blob], spool: Spool) -> dict[str, dict[str, Blob]]:
    """Append the files of zips which lie in an archive or a folder themselves, such as .npz files, to `spool`.

    Args:
        zips: where they come from, for messages -> content.

    Returns:
        for each of them, name -> Blob of its files.

    Raises:
        DataError: as :func:`unpack` does; the limit is that of all together.
    """
    unpacked: dict[str, dict[str, Blob]] = {}
    contents = {where: blob.read() for where, blob in zips.items()}
    limit = _limit(sum(map(len, contents.values())))
    for where, content in contents.items():
        with _damage_named(where):
            unpacked[where] = _unpack_zip(where, io.BytesIO(content), spool, limit)[0]
        limit -= sum(blob.size for blob in unpacked[where].values())
    return unpacked


def _limit(size: int) -> int:
    """How many bytes an archive of so many may unpack to."""
    return max(LARGEST_SMALL, LARGEST_RATIO * size)


@contextlib.contextmanager
def _damage_named(path: Path | str) -> Iterator[None]:
    """Make a DataError of whatever a damaged archive makes the modules raise."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path}: unpacking it takes more memory than there is; unpack it and give the folder"
        ) from error
    except Exception as error:  # forged headers make these modules raise almost anything, also an OSError
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk is full, say
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path | str, error: BaseException) -> DataError:
    reason = str(error)[:200] or type(error).__name__
    return DataError(f"{path}: truncated or damaged archive ({reason}); download or copy it again")


class _Bounded:
    """Reads an uncompressed tar stream: counts the bytes against a limit, and remembers where the zeros at the end
    begin."""

    def __init__(self, file: IO[bytes], path: Path, limit: int) -> None:
        self._file, self._path, self._limit = file, path, limit
        self.count, self.zeros_from = 0, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if significant := len(data.rstrip(b"\0")):
            self.zeros_from = self.count + significant
        self.count += len(data)
        if self.count > self._limit:
            raise _too_large(self._path, self._limit)
        return data


def _unpack_tar(path: Path, spool: Spool, limit: int, start: bytes) -> tuple[dict[str, Blob], set[str]]:
    opener = next((MAGIC[magic] for magic in MAGIC if start.startswith(magic)), open)
    files: dict[str, Blob] = {}
    folders: set[str] = set()
    with opener(path, "rb") as raw:
        stream = _Bounded(raw, path, limit)
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members = []  # the module would keep every header in memory
                name = _safe_name(path, member.name)
                if member.isdir():
                    folders.add(name)
                elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                    content = tar.extractfile(member)
                    if content is None:
                        raise _damaged(path, ValueError(f"{member.name} has no content"))
                    # A name that comes twice means the later one, as in tar itself.
                    files[name] = _append(path, spool, content, member.name, member.size, limit)
                else:
                    raise DataError(f"{path}: {member.name} is {_NOT_UNPACKED.get(member.type, _OTHER)}")
            end = tar.offset
        # tarfile takes a missing end marker, and a header it cannot read, for the end. So read on, which also verifies
        # the checksum of the compression, and insist on a block of zeros there and nothing behind it.
        while stream.read(BLOCK):
            pass
    if stream.count < end + tarfile.BLOCKSIZE or stream.zeros_from > end:
        raise _damaged(path, EOFError(f"no proper end after {end} bytes"))
    return files, folders


def _unpack_zip(path: Path | str, file: Path | IO[bytes], spool: Spool, limit: int) -> tuple[dict[str, Blob], set[str]]:
    files: dict[str, Blob] = {}
    folders: set[str] = set()
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > limit:
            raise _too_large(path, limit)
        for member in members:
            name = _safe_name(path, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                if member.file_size:  # a file whose name was cut at a slash
                    raise _damaged(path, ValueError(f"{member.filename} is a folder with content"))
                folders.add(name)
                continue
            if kind not in (0, stat.S_IFREG):
                raise DataError(f"{path}: {member.filename} is a link or a device; pack the plain files")
            if member.flag_bits & 1:
                raise DataError(f"{path}: {member.filename} is encrypted; pack it without a password")
            try:
                content = archive.open(member)
            except NotImplementedError as error:
                raise DataError(f"{path}: {member.filename}: {error}; pack it with deflate") from error
            with content:
                files[name] = _append(path, spool, content, member.filename, member.file_size, limit)
    return files, folders


def _append(path: Path | str, spool: Spool, content: IO[bytes], name: str, size: int, limit: int) -> Blob:
    if size > limit:  # before memory is asked for it
        raise _too_large(path, limit)
    if size < 0:
        raise _damaged(path, ValueError(f"{name} of {size} bytes"))
    data = content.read(size)
    if len(data) != size or content.read(1):  # the second read makes zipfile verify the checksum
        raise _damaged(path, EOFError(f"{name} has not the {size} bytes it should have"))
    return spool.append(data)


def _too_large(path: Path | str, limit: int) -> DataError:
    return DataError(
        f"{path}: unpacks to more than {limit >> 20} MiB, which no data set of this size does; "
        "if it is genuine, unpack it yourself and give the folder"
    )


def _safe_name(path: Path | str, name: str) -> str:
    parts = name.split("/")
    if len(name) > LONGEST_NAME:
        raise DataError(f"{path}: member {name[:80]!r}… has a name of {len(name):,} characters; do not trust this file")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or re.match(r"^[A-Za-z]:", name):
        raise DataError(f"{path}: member {name!r} points outside the archive; do not trust this file")
    return "/".join(part for part in parts if part not in ("", "."))
