"""What a policy does to one image, in words."""

from __future__ import annotations

import numpy as np

from rsengine.augment.policy_loop import augmix_weights, chain_length, draw_group, draw_setting
from rsengine.augment.program import Program


def describe(program: Program, seed: int, epoch: int, index: int) -> list[str]:
    """The settings applied to image ``index`` in their order; for AugMix a line for each chain, with its weight."""
    tables = program.first, program.levels, program.gates

    def names(group: int, start: int, stop: int) -> list[str]:
        drawn = (draw_setting(seed, index, epoch, group, slot, *tables) for slot in range(start, stop))
        return [program.names[s] for s in drawn if s >= 0]

    if not program.chains:
        return names(draw_group(seed, index, epoch, len(program.first)), 0, program.slots)
    weights = np.empty(1 + program.chains, np.int64)
    augmix_weights(seed, index, epoch, program.slots, program.chains, program.exponentials, weights)
    depth = program.slots // program.chains
    lines = []
    for chain in range(program.chains):
        length = chain_length(seed, index, epoch, program.slots, program.chains, chain)
        done = ", ".join(names(0, chain * depth, chain * depth + length))
        lines.append(f"{weights[1 + chain] / 65536:.0%} {done}")
    return lines
