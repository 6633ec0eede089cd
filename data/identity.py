"""What makes two converted data sets the same: the samples of both splits, as stored and in their order.

The checksum of the source does not tell: another seed, share or size makes other splits of one source, and a run that
goes on with them tests on what it was trained on. Every option that matters shows in what is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rsengine.data.beton.reader import BetonReader


def content_identity(classes: Sequence[str], betons: Sequence[Path]) -> str:
    """64 hexadecimal digits for class names, labels, sizes and stored pixels, whatever their places in the files are.

    Raises DataError when a file is damaged.
    """
    total = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for path in betons:
        reader = BetonReader(path)
        columns = [reader.labels, reader.heights, reader.widths, reader.modes.astype(np.int64), reader.sizes]
        total.update(len(reader).to_bytes(8, "little") + np.stack(columns).astype("<i8").tobytes())
        for index in range(len(reader)):
            total.update(reader.stored(index))
    return total.hexdigest()


def images_in_common(first: Path, second: Path) -> int:
    """How many images of the second .beton file are in the first too, byte for byte as stored.

    Raises DataError when a file is damaged.
    """

    def digests(path: Path) -> Iterator[tuple[int, int, bytes]]:
        reader = BetonReader(path)
        for index in range(len(reader)):
            digest = hashlib.blake2b(reader.stored(index), digest_size=16).digest()
            yield int(reader.heights[index]), int(reader.widths[index]), digest

    known = set(digests(first))
    return sum(each in known for each in digests(second))
