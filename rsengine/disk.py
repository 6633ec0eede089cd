"""Flushing files and folders to the disk, also where the file system cannot."""

from __future__ import annotations

import errno
import os

# What file systems answer that have no such call, as some on a network or in user space have none for folders. Nothing
# was lost then, unlike with EIO or ENOSPC.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file or a folder to the disk, or leave that to a file system which knows no flushing. Raises OSError.

    A folder that may be written to but not read, as none may be on Windows, cannot be flushed, and is left too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
