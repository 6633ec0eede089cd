"""Write .beton files with FFCV, under supervision, and check every sample of what was written.

FFCV's writer waits forever when one of its processes dies or a sample raises, writes an empty allocation table when
an error occurs at the end, prints its own progress, and importing it sets torch to one thread. So it runs in a child
process of ours: the parent watches its progress and ends it when there is none, its output goes to a file, and the
parent never imports it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from rsengine.data.beton.processes import follow_parent, fork_context, start_worker
from rsengine.data.beton.reader import MODE_JPEG, MODE_RAW, BetonReader
from rsengine.data.beton.scan import Scan
from rsengine.data.errors import DataError
from rsengine.data.sources.images import Split

IMAGE_FORMATS = ("raw", "jpg")
JPEG_QUALITY = 95
SMALLEST_PAGE, USUAL_PAGE, LARGEST_PAGE = 1 << 21, 1 << 23, 1 << 31  # bytes; an image must fit in a page
STALL_SECONDS = 120.0  # no sample written for so long means that the writer hangs
GRACE_SECONDS = 5.0  # for the writer to tidy up after SIGTERM
POLL_SECONDS = 0.05
JPEG_DRIFT = 10.0  # grey levels by which JPEG may move the mean of an image and channel; swapped channels move it more


@dataclass(frozen=True, eq=False)
class Job:
    """One file to write: where, the samples, and what the scan found in them."""

    path: Path
    split: Split
    scan: Scan


class _Samples:
    """What FFCV indexes: (pixels, label), counting as it goes. Used in FFCV's forked workers."""

    def __init__(self, job: Job, done: Any, failure: Path) -> None:
        self._split, self._images, self._done, self._failure = job.split, job.scan.images, done, failure
        self._writer, self._worker = os.getpid(), -1

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if self._worker != os.getpid():  # the first sample in this worker
            start_worker(self._writer)
            self._worker = os.getpid()
        try:
            image = self._split.load(int(index))[0] if self._images is None else self._images[index]
            label = int(self._split.labels[index])
        except BaseException as error:
            message = str(error) if isinstance(error, DataError) else f"{self._split.name(int(index))}: {error!r}"
            self._failure.write_text(message, encoding="utf-8")
            raise
        with self._done.get_lock():
            self._done.value += 1
        return image, label


def write_betons(
    jobs: Sequence[Job],
    scratch: Path,
    *,
    image_format: str = "raw",
    workers: int = 2,
    stall_seconds: float = STALL_SECONDS,
    progress: bool = False,
) -> None:
    """Write one .beton file a job, fields `image` then `label`, samples in order; then check them with `verify_beton`.

    Args:
        scratch: a folder for a log and an error message, removed by the caller.
        image_format: "raw", or "jpg" for JPEG of quality 95.
        workers: processes of FFCV.
        stall_seconds: give up after this many seconds without a new sample.

    Raises:
        DataError: the writer failed, died or made no progress; its processes are ended by then.
    """
    done = fork_context().Value("Q", 0)
    log, failure = scratch / "writer.log", scratch / "writer.failure"
    resource_tracker.ensure_running()  # ours, so that it survives if the writer and its group have to be killed
    writer = fork_context().Process(  # type: ignore[attr-defined]
        target=_write, args=(jobs, image_format, workers, done, log, failure, os.getpid())
    )
    total = sum(len(job.split) for job in jobs)
    writer.start()
    try:
        with tqdm(total=total, desc="write", unit="img", leave=False, disable=None if progress else True) as bar:
            stalled = _wait(writer, done, total, stall_seconds, bar)
    finally:
        _end(writer)
    if stalled or writer.exitcode != 0:
        raise DataError(_reason(jobs, stalled, stall_seconds, log, failure, writer.exitcode))
    for job in jobs:
        verify_beton(job, image_format)


def verify_beton(job: Job, image_format: str) -> None:
    """Compare a .beton file with its source: number of samples, labels, sizes, and the pixels of every image (for JPEG
    the mean of every image and channel, since the pixels differ).

    Raises:
        DataError: they differ.
    """
    beton, scan = BetonReader(job.path), job.scan
    if len(beton) != len(job.split):
        raise DataError(f"{job.path.name}: {len(beton)} samples were written, not {len(job.split)}; run it again")
    if not np.array_equal(beton.labels, job.split.labels):
        raise DataError(f"{job.path.name}: the labels written differ from the source; run it again")
    if not (np.array_equal(beton.heights, scan.heights) and np.array_equal(beton.widths, scan.widths)):
        raise DataError(f"{job.path.name}: the image sizes written differ from the source; run it again")
    if not (beton.modes == (MODE_RAW if image_format == "raw" else MODE_JPEG)).all():
        raise DataError(f"{job.path.name}: the images are not stored as {image_format}; run it again")
    for index in range(len(beton)):
        image = beton.image(index)
        if image_format == "raw":
            same = zlib.crc32(image) == int(scan.checksums[index])
        else:
            same = bool((abs(image.mean(axis=(0, 1)) - scan.means[index]) <= JPEG_DRIFT).all())
        if not same:
            raise DataError(
                f"{job.split.name(index)}: what was written differs from the source, "
                "which may have changed during the conversion; run it again"
            )


def _wait(writer: BaseProcess, done: Any, total: int, stall_seconds: float, bar: tqdm) -> bool:
    """Wait for the writer to end, or for a stall, in which case return True."""
    seen, since = 0, time.monotonic()
    while writer.is_alive():
        writer.join(POLL_SECONDS)
        now = min(done.value, total)  # a sample that did not fit its page may be asked for again
        if now > seen:
            bar.update(now - seen)
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            return True
    return False


def _end(writer: BaseProcess) -> None:
    """End the writer and its workers, gently first so that it releases its shared memory."""
    if writer.pid is None:
        return
    if writer.is_alive():
        writer.terminate()
        writer.join(GRACE_SECONDS)
    try:
        os.killpg(writer.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # The usual case: nobody is left in its group, or it died before it had one.
        writer.kill()
    writer.join()


def _reason(
    jobs: Sequence[Job], stalled: bool, stall_seconds: float, log: Path, failure: Path, exitcode: int | None
) -> str:
    if failure.exists():
        return failure.read_text(encoding="utf-8")
    names = " and ".join(job.path.name for job in jobs)
    if stalled:
        return f"{names}: the writer made no progress for {stall_seconds:g} s and was ended; try --workers 1"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if "Error" in line and not line.startswith(" ")), "no message")
    return f"{names}: the writer failed (exit code {exitcode}: {last.strip()}); check the disk space and run it again"


# ---- in the child process ------------------------------------------------------------------------------------------


def _write(
    jobs: Sequence[Job], image_format: str, workers: int, done: Any, log: Path, failure: Path, parent: int
) -> None:
    os.setpgid(0, 0)  # so that the parent can end this process and FFCV's workers together, and Ctrl-C spares them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    follow_parent(parent, signal.SIGTERM)
    output = log.open("a", buffering=1, encoding="utf-8")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    tqdm.set_lock(threading.RLock())  # the parent's is shared with this process, which may be killed while it holds it
    multiprocessing.set_start_method("fork", force=True)
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    _ = IMAGE_MODES[image_format]  # compiles the lookup here, once, and not in every worker
    workers_seen: list[BaseProcess] = []

    def start_process(*arguments: Any, **options: Any) -> BaseProcess:
        workers_seen.append(multiprocessing.Process(*arguments, **options))
        return workers_seen[-1]

    # FFCV does not expose its processes, and listing our children is not enough: one that dies at once would be missed.
    ffcv.writer.Process = start_process
    threading.Thread(target=_watch_workers, args=(workers_seen, failure), daemon=True).start()
    for job in jobs:
        fields = {"image": RGBImageField(write_mode=image_format, jpeg_quality=JPEG_QUALITY), "label": IntField()}
        needed = max(1, min(workers, len(job.split) // 64))
        page = _page_size(job.scan.largest(), 3 * job.scan.pixels)
        writer = ffcv.writer.DatasetWriter(str(job.path), fields, page_size=page, num_workers=needed)
        with _released(writer):
            writer.from_indexed_dataset(_Samples(job, done, failure), chunksize=64)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _page_size(largest: int, total: int) -> int:
    """A power of two that holds the largest image; below the usual size only where that holds them all."""
    size = SMALLEST_PAGE
    while size < largest or size < min(total, USUAL_PAGE):
        size *= 2
    if size > LARGEST_PAGE:
        raise DataError(f"an image of {largest} bytes is too large for a .beton file; use --size")
    return size


@contextmanager
def _released(writer: Any) -> Iterator[None]:
    """When the writing fails, end FFCV's workers, free its shared memory and leave the process.

    Leaving is abrupt, because an orderly exit would wait for a queue that nobody reads any more.
    """
    try:
        yield
    except BaseException:
        traceback.print_exc()  # into the log
        for process in multiprocessing.active_children():
            process.kill()
        memory = getattr(writer, "metadata_sm", None)
        if memory is not None and not isinstance(memory, int):
            memory.unlink()
        os._exit(1)


def _watch_workers(workers: list[BaseProcess], failure: Path) -> None:
    """End this process when one of FFCV's workers dies, which FFCV would not notice."""
    while True:
        for worker in list(workers):
            if worker.exitcode:
                if not failure.exists():
                    failure.write_text(
                        f"a process of the writer died (exit code {worker.exitcode}), probably for want of memory; "
                        "try again with --workers 1",
                        encoding="utf-8",
                    )
                os.kill(os.getpid(), signal.SIGTERM)
                return
        time.sleep(POLL_SECONDS)
