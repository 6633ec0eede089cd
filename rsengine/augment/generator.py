"""A counter-based random number generator for numba code: splitmix64 (Steele, Lea & Flood, OOPSLA 2014).

A draw is a pure function of (seed, epoch, index, stream, counter); there is no state to share, save or restore.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@njit(cache=True, nogil=True)
def mix(x: np.uint64) -> np.uint64:
    """The finaliser of splitmix64: a bijection of 64-bit words that flips half the bits for each bit of input."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def key(seed: int, epoch: int, index: int, stream: int) -> np.uint64:
    """The key of one image's draws in one operation. ``stream`` is the operation's own number."""
    state = mix(np.uint64(seed) + _GOLDEN)
    state = mix(state ^ (np.uint64(epoch) + _GOLDEN))
    state = mix(state ^ (np.uint64(index) + _GOLDEN))
    return mix(state ^ (np.uint64(stream) + _GOLDEN))


@njit(cache=True, nogil=True)
def draw(image_key: np.uint64, counter: int, bound: int) -> int:
    """An integer from 0 to ``bound`` - 1, uniform to one part in 2**32 / bound."""
    bits = mix(image_key + _GOLDEN * np.uint64(counter + 1)) >> np.uint64(32)
    return np.int64((bits * np.uint64(bound)) >> np.uint64(32))
