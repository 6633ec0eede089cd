"""Philox4x32-10, a counter-based random number generator (Salmon et al., SC 2011), for numba code.

A draw is a pure function of (seed, epoch, index of the image, stream, block); there is no state to share, save or
restore, and device code computes the same words.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@njit(cache=True, nogil=True)
def philox(
    seed: int, index: int, epoch: int, stream: int, block: int
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Four words of 32 random bits, as uint64. The seed has 64 bits, the other four 32 each."""
    k0, k1 = np.uint64(seed) & _LOW, np.uint64(seed) >> _HALF
    c0, c1 = np.uint64(index) & _LOW, np.uint64(epoch) & _LOW
    c2, c3 = np.uint64(stream) & _LOW, np.uint64(block) & _LOW
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def below(word: np.uint64, bound: int) -> int:
    """An integer from 0 to ``bound`` - 1, uniform to one part in 2**32 / bound."""
    return np.int64((word * np.uint64(bound)) >> _HALF)
