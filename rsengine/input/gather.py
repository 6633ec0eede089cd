"""Copies images out of a memory map, as numba code."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def gather(file: np.ndarray, pointers: np.ndarray, chosen: np.ndarray, out: np.ndarray) -> None:
    """Fill ``out``, (N, bytes of an image) uint8, with what lies in ``file``, (F,) uint8, from ``pointers[chosen]`` on.

    ``pointers``: (M,) int64, one for each image of the file; ``chosen``: (N,) int64, places below M.
    """
    for i in range(len(chosen)):
        start = np.uint64(pointers[chosen[i]])  # unsigned, because numba wraps negative places around, byte by byte
        for byte in range(out.shape[1]):
            out[i, byte] = file[start + np.uint64(byte)]
