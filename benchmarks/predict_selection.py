"""How long a block of `beam_step` works and waits, from what its code does one after the other; not measured.

The instructions of a warp on the longest way, counted in what nvcc 13 makes of csrc/cuda/beam_step.cu for sm_90 with
bfloat16 logits; two cycles each, since a multiprocessor has little beside them to do. Waits are those of "Benchmarking
and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking" (Luo et al., 2024), in cycles: 479 for memory,
263 for the second cache, where the logits are that have just been written.
"""

from __future__ import annotations

from math import ceil

CYCLES = 2
MEMORY, SECOND_CACHE, BARRIER = 479, 263, 25
WARP, WARPS = 32, 8
# blocks of which a multiprocessor holds at once, by the audit
BLOCKS = 3
# loads of a lane that are under way together
LOADS = 8
BARRIERS = 13
# instructions whatever the sizes: addresses and parameters; ancestors asked for; reductions; the end of the search and
# what is written; for a token of a lane: load, exponential, log-probability
SETTING_UP, ASKING, REDUCING, WRITING = 200, 100, 280, 400
TOKEN = 14 + 13 + 13
# for a candidate of a thread; for one that others are compared with, first by 4 bytes and then by 8
LISTED, COMPARED, RANKED = 26, 4, 10
# for each candidate that is wanted: into pool and hypotheses; and each entry of the pool
SORTED, SORTED_EACH, POOLED, POOLED_EACH = 365, 9, 215, 75


def beam_step_cycles(beams: int, vocabulary: int) -> float:
    """Returns the cycles that a block takes for an utterance in whose step a hypothesis ends; without a launch."""
    wanted, lane = 2 * beams, ceil(vocabulary / WARP)
    rows = ceil(beams / WARPS)
    instructions = SETTING_UP + ASKING + WRITING + rows * (lane * TOKEN + REDUCING)
    instructions += ceil(beams * wanted / (WARP * WARPS)) * beams * wanted * COMPARED
    instructions += ceil(beams * vocabulary / (WARP * WARPS)) * LISTED
    # about as many come through as are wanted, and half as many again
    instructions += 1.5 * wanted * RANKED
    instructions += SORTED + SORTED_EACH * wanted + POOLED + POOLED_EACH * beams
    waits = MEMORY + rows * ceil(lane / LOADS) * SECOND_CACHE + BARRIERS * BARRIER
    return CYCLES * instructions + waits
