"""A compiled policy applied to a batch, as numba code: sampling by image, then its settings one after the other."""

from __future__ import annotations

import numpy as np
from numba import njit

from rsengine.augment.generator import below, philox
from rsengine.augment.pixels import apply_setting, copy_pixels
from rsengine.augment.program import Program
from rsengine.kernels.augment_tables import IDENTITY, POLICY_STREAM

_ONE = 65536  # the sum of AugMix's weights


def program_arrays(program: Program) -> tuple[np.ndarray, ...]:
    """The arrays of a program that the loops below read."""
    names = "kinds", "factors", "lookups", "tables", "fixed", "matrices", "first", "levels", "gates", "exponentials"
    return tuple(np.ascontiguousarray(getattr(program, name)) for name in names)


@njit(cache=True, nogil=True)
def draw_group(seed, index, epoch, groups):
    return below(philox(seed, index, epoch, POLICY_STREAM, 0)[0], groups)


@njit(cache=True, nogil=True)
def draw_setting(seed, index, epoch, group, slot, first, levels, gates):
    """The setting of a slot, or -1 where none is applied."""
    choice_word, gate_word, level_word, sign_word = philox(seed, index, epoch, POLICY_STREAM, 1 + slot)
    choice = below(choice_word, first.shape[2])
    if np.int64(gate_word) >= gates[group, slot, choice]:
        return np.int64(-1)
    level = below(level_word, levels[group, slot, choice])
    return np.int64(first[group, slot, choice]) + 2 * level + below(sign_word, 2)


@njit(cache=True, nogil=True)
def chain_length(seed, index, epoch, slots, chains, chain):
    return 1 + below(philox(seed, index, epoch, POLICY_STREAM, 1 + slots + chain)[0], slots // chains)


@njit(cache=True, nogil=True)
def _run_slots(image, out, seed, index, epoch, group, start, stop, tables, bilinear, fill, scratch, counts):
    """Apply slots ``start`` to ``stop`` to ``image`` in place. ``out``: work space of one image."""
    kinds, factors, lookups, rows, fixed, matrices, first, levels, gates, _ = tables
    for slot in range(start, stop):
        s = draw_setting(seed, index, epoch, group, slot, first, levels, gates)
        if s >= 0 and kinds[s] != IDENTITY:
            apply_setting(
                image,
                out,
                kinds[s],
                factors[s],
                rows[lookups[s]],
                fixed[s],
                matrices[s],
                bilinear,
                fill,
                scratch,
                counts,
            )
            copy_pixels(out, image)


@njit(cache=True, nogil=True)
def run_policy(images, indices, seed, epoch, tables, bilinear, fill):
    """Apply a policy to (N, H, W, 3) uint8 ``images`` in place; ``indices``: (N,) int64, places in the data set."""
    first = tables[6]
    out, scratch, counts = np.empty_like(images[0]), np.empty(256, np.uint8), np.empty(256, np.int64)
    for i in range(len(images)):
        group = draw_group(seed, indices[i], epoch, first.shape[0])
        _run_slots(
            images[i], out, seed, indices[i], epoch, group, 0, first.shape[1], tables, bilinear, fill, scratch, counts
        )


@njit(cache=True, nogil=True)
def augmix_weights(seed, index, epoch, slots, chains, exponentials, weights):
    """Fill ``weights``, (1 + chains,) int64: of the image itself and of each chain. Their sum is 65536."""
    share = below(philox(seed, index, epoch, POLICY_STREAM, 0)[1], _ONE + 1)
    total = np.int64(0)
    for chain in range(chains):
        word = philox(seed, index, epoch, POLICY_STREAM, 1 + slots + chain)[1]
        weights[1 + chain] = exponentials[below(word, len(exponentials))]
        total += weights[1 + chain]
    left = share
    for chain in range(chains - 1):
        weights[1 + chain] = share * weights[1 + chain] // total
        left -= weights[1 + chain]
    weights[chains] = left
    weights[0] = _ONE - share


@njit(cache=True, nogil=True)
def run_augmix(images, indices, seed, epoch, tables, chains, bilinear, fill):
    """As :func:`run_policy`, for a program with ``chains``."""
    slots, exponentials = tables[6].shape[1], tables[9]
    depth = slots // chains
    out, chained, scratch = np.empty_like(images[0]), np.empty_like(images[0]), np.empty(256, np.uint8)
    counts, weights = np.empty(256, np.int64), np.empty(1 + chains, np.int64)
    mixed = np.empty(images[0].size, np.int64)
    for i in range(len(images)):
        index = indices[i]
        augmix_weights(seed, index, epoch, slots, chains, exponentials, weights)
        flat, chained_flat = images[i].reshape(-1), chained.reshape(-1)
        for p in range(mixed.size):
            mixed[p] = weights[0] * flat[p]
        for chain in range(chains):
            copy_pixels(images[i], chained)
            start = chain * depth
            stop = start + chain_length(seed, index, epoch, slots, chains, chain)
            _run_slots(chained, out, seed, index, epoch, 0, start, stop, tables, bilinear, fill, scratch, counts)
            for p in range(mixed.size):
                mixed[p] += weights[1 + chain] * chained_flat[p]
        for p in range(mixed.size):
            flat[p] = np.uint8(mixed[p] >> 16)
