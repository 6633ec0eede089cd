"""Find a data set to train on, converting it into a cache where needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from rsengine.cache import VARIABLE as CACHE_VARIABLE
from rsengine.cache import cache_folder
from rsengine.data.convert import convert
from rsengine.data.dataset import FORMAT_VERSION, Dataset, load_dataset
from rsengine.data.errors import DataError
from rsengine.data.paths import DESCRIPTION, expanded
from rsengine.data.sources.archives import file_digest
from rsengine.data.sources.official import BY_ARCHIVE, FOLDERS
from rsengine.data.sources.open import DIGITS, is_named, place_of, source_name
from rsengine.data.sources.torchvision_sets import PREFIX, fetch
from rsengine.data.sources.tree import walk
from rsengine.data.staging import put_back
from rsengine.output import counted
from rsengine.temporaries import remove_abandoned, remove_folders, temporary_folder

VARIABLE = "RSENGINE_DATA"
LOCAL_FOLDER = "data"
READING = 4  # counts the changes in what a conversion makes of a source: what was made before is not taken for it
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # where torchvision gets it too
PROBE_SECONDS, DOWNLOAD_SECONDS = 4.0, 30.0  # without an answer; a download as a whole may take longer

CONVERTING = re.compile(r"\..+\.tmp-(?P<pid>\d+)")  # names of data sets under construction


class NotConverted(DataError):
    """A data set that is there and not converted yet. ``source`` names it, for :func:`rsengine.data.convert`."""

    def __init__(self, message: str, source: str) -> None:
        super().__init__(message)
        self.source = source


def find_dataset(
    data: str | os.PathLike[str] | None = None,
    *,
    fallback_digits: bool = False,
    conversion: bool = True,
    log: Callable[[str], None] = print,
) -> Dataset:
    """The data set to train on.

    With `data`: a converted folder, "digits", or any source `convert` reads. Without: the environment variable
    RSENGINE_DATA, which may name the same things; the folder data/ under the current one, with a converted data set or
    an official CIFAR archive or folder in it; a download of CIFAR-10 through torchvision. Sources are converted into
    the cache folder ($RSENGINE_CACHE, $XDG_CACHE_HOME/rsengine or ~/.cache/rsengine) and found there the next time.

    Args:
        data: see above.
        fallback_digits: take the handwritten digits when nothing is found, instead of raising. Not for a `data` or
            RSENGINE_DATA that is wrong: that is an error in any case.
        conversion: False: download and convert nothing.
        log: called with one line for each decision.

    Raises:
        NotConverted: without ``conversion``, the data set is there and would have to be converted, or downloaded.
        DataError: what was asked for is wrong, or nothing was found; one line with the remedy.
    """
    if data is not None:
        return _open(os.fspath(data), log, conversion)
    if value := named_by_environment():
        log(f"data: {VARIABLE} names {value}")
        return _open(value, log, conversion)
    local = Path(LOCAL_FOLDER)
    if (known := known_in(local)) is not None:
        log(f"data: found {known}")
        return _open(known, log, conversion)
    looked = f"{VARIABLE} is not set, and {local.absolute()} holds no converted data set and no CIFAR archive"
    if not conversion:
        raise NotConverted(f"{looked}: a run would download CIFAR-10 first, and convert it", "CIFAR-10")
    try:
        return _open(download_cifar10(log), log)
    except _NoDownload as error:
        problem = str(error)
    if fallback_digits:
        log(f"data: {looked}; {problem}. Falling back to scikit-learn's handwritten digits: a working run, not CIFAR")
        return _open(DIGITS, log)
    raise DataError(
        f"no data set: {looked}; {problem}. Give --data with a CIFAR archive, a converted folder or class folders, "
        f"set {VARIABLE} to one, or use --data digits"
    )


def named_by_environment() -> str:
    """What RSENGINE_DATA names; empty where it names nothing."""
    return os.environ.get(VARIABLE, "").strip()


def variable_of(data: str | os.PathLike[str] | None) -> str:
    """The environment variable that names what :func:`find_dataset` finds for ``data``; empty where none does."""
    return VARIABLE if data is None and named_by_environment() else ""


def known_in(folder: Path) -> Path | None:
    """A data set in `folder` that needs no guessing: converted (the folder itself, or one directly in it), or an
    official CIFAR archive or folder, CIFAR-10 before CIFAR-100. None if there is none.

    Raises:
        DataError: several converted data sets, so that one must be named.
    """
    if not folder.is_dir():
        return None
    if (folder / DESCRIPTION).is_file():
        return folder
    converted = sorted(
        entry for entry in folder.iterdir() if not entry.name.startswith(".") and (entry / DESCRIPTION).is_file()
    )
    if len(converted) > 1:
        raise DataError(f"{folder}: holds several data sets ({', '.join(e.name for e in converted)}); name one of them")
    if converted:
        return converted[0]
    names: Iterable[str] = (*FOLDERS[:2], *list(BY_ARCHIVE)[::2], *FOLDERS[2:], *list(BY_ARCHIVE)[1::2])
    return next((folder / name for name in names if (folder / name).exists()), None)


def fingerprint(source: str | Path) -> str:
    """64 hexadecimal digits that change when the source does, or the way it is read.

    Names, sizes and times of the files that a conversion would read are compared, through links as there. Not their
    contents, which would take long; but the time of the last change to a file, which no copy sets back as it may the
    time of modification, and which differs where a link leads elsewhere.

    Raises:
        OSError: a file that cannot be looked at.
        DataError: what a conversion would refuse, see :func:`rsengine.data.sources.tree.walk`.
    """
    entries: list[tuple[str, int, int, int]] = []
    folders: set[str] = set()
    if (place := place_of(source)) is not None:
        path = place.resolve()
        files, folders = walk(path) if path.is_dir() else ({path.name: str(path)}, folders)
        for each in sorted(files.values()):
            status = os.stat(each) if os.path.exists(each) else os.lstat(each)  # a link that leads nowhere
            entries.append((each, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    known = str(source) if is_named(source) else ""
    text = json.dumps([FORMAT_VERSION, READING, known, sorted(folders), entries])
    return hashlib.sha256(text.encode()).hexdigest()


def _open(what: str | Path, log: Callable[[str], None], conversion: bool = True) -> Dataset:
    source: str | Path = str(what) if is_named(what) else expanded(what)
    if isinstance(source, Path):
        put_back(source)
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; check --data or {VARIABLE}, or use --data digits")
        if source.is_dir() and (known := known_in(source)) is not None:
            if known != source:
                log(f"data: {source} holds {known.name}")
            source = known
            if (source / DESCRIPTION).is_file():
                dataset = load_dataset(source)
                log(f"data: {dataset.name} in {source}, {dataset.train_count} + {counted(dataset.test_count, 'image')}")
                return dataset
    return _converted(source, log, conversion)


def _converted(source: str | Path, log: Callable[[str], None], conversion: bool) -> Dataset:
    """The conversion of `source` in the cache, made now if there is none."""
    if not conversion and str(source).startswith(PREFIX):
        raise NotConverted(f"{source}: a run would download it first where that is needed, and convert it", str(source))
    if str(source).startswith(PREFIX):
        fetch(str(source), log)  # before its files are looked at
    try:
        mark = fingerprint(source)[:12]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; check the path and its permissions") from error
    folder = cache_folder() / "datasets" / f"{source_name(source)}-{mark}"
    if not conversion and not folder.exists():
        raise NotConverted(f"{source}: a run would convert it into {folder} first", str(source))
    # All in this folder is ours, so what killed conversions of other sources left there goes too.
    remove_abandoned(folder.parent, CONVERTING)
    damaged = False
    if folder.exists():
        try:
            dataset = load_dataset(folder)
        except DataError as error:
            damaged = True
            if not conversion:
                raise NotConverted(f"{error}; a run would do so first", str(source)) from error
            log(f"data: {error}; doing so")
        else:
            log(f"data: {source}, converted earlier, in {folder}")
            return dataset
    log(f"data: converting {source} into {folder}")
    try:
        return convert(source, folder, overwrite=damaged, progress=True, log=log)
    except DataError as error:
        # Another process may have converted the same source meanwhile; then its result is as good as ours.
        if not damaged and (folder / DESCRIPTION).is_file():
            dataset = load_dataset(folder)
            log(f"data: {source} was converted by another process meanwhile")
            return dataset
        refused = error.__cause__
        if isinstance(refused, OSError) and not str(refused.filename).startswith(str(source)):
            raise DataError(f"{error}; {CACHE_VARIABLE} can name another folder for what is converted") from refused
        raise


class _NoDownload(Exception):
    """Why CIFAR-10 could not be downloaded."""


def download_cifar10(log: Callable[[str], None]) -> Path:
    """The official archive in the cache, downloaded through torchvision if it is not there.

    Raises:
        _NoDownload: no network, or an incomplete download.
    """
    layout = BY_ARCHIVE[URL.rpartition("/")[2]]
    target = cache_folder() / "downloads" / layout.archive
    remove_folders("download", target.parent)
    if target.is_file() and file_digest(target, "md5") == layout.md5:
        return target
    if (problem := network_problem()) is not None:
        raise _NoDownload(f"CIFAR-10 cannot be downloaded ({problem})")
    log(f"data: downloading CIFAR-10 (170 MB) from {URL} into {target.parent}")
    from torchvision.datasets.utils import download_url

    target.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SECONDS)  # torchvision sets none, and would wait forever on a dead connection
    try:
        # Into its own folder: torchvision writes under the final name, and two processes may download at once.
        with temporary_folder("download", target.parent) as folder:
            download_url(URL, str(folder), layout.archive, layout.md5)
            (folder / layout.archive).rename(target)
    except (OSError, RuntimeError) as error:  # RuntimeError is torchvision's word for a wrong checksum
        raise _NoDownload(f"the download of CIFAR-10 failed ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return target


def network_problem() -> str | None:
    """None if the server of CIFAR-10 answers within seconds, otherwise what is wrong. Proxies are honoured."""
    request = urllib.request.Request(URL, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return None
    except (urllib.error.URLError, OSError) as error:
        return f"no answer from {request.host}: {getattr(error, 'reason', None) or error}"
