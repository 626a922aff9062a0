"""How many blocks of a kernel a multiprocessor holds at once, and the kernels that may do with one.

A block waits for memory and at barriers; with a second one beside it the multiprocessor still has work. The limits are
those of the CUDA Programming Guide's table of compute capabilities, the rounding that of NVIDIA's cuda_occupancy.h.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from .rows import AuditRow

WARP = 32
# of each architecture of the table: warps and blocks of a multiprocessor, its registers, its bytes of shared memory
MOST_WARPS, MOST_BLOCKS, REGISTERS = 64, 32, 65536
SHARED_MEMORY_OF_ALL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# registers are given to whole warps, in this number, by each of the four parts of a multiprocessor on its own
REGISTER_UNIT, PARTS = 256, 4
# bytes: shared memory is given in units, and the driver takes some for each block
SHARED_UNIT, SHARED_RESERVED = 128, 1024
WANTED = 2


class OneBlock(NamedTuple):
    """Compiled kernels of which a multiprocessor may hold one block. Empty fields stand for all.

    kernel: its name. reason: why it is so and stays so. architectures, dtypes: of the rows meant.
    tiles: what the tile of a row meant begins with.
    """

    kernel: str
    reason: str
    architectures: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()

    def covers(self, row: AuditRow) -> bool:
        return (
            row.kernel == self.kernel
            and (not self.architectures or row.architecture in self.architectures)
            and (not self.dtypes or row.dtype in self.dtypes)
            and (not self.tiles or row.tile.startswith(self.tiles))
        )


# a kernel with one of these in its name must have two blocks: those of decoding and of attention
HELD_TO_IT = ("attention", "decode", "beam_step", "sample_step", "fused_step")
# the one list of exceptions; an entry whose kernels all have two blocks is a fault of its own
ONE_BLOCK: tuple[OneBlock, ...] = (
    OneBlock(
        "fused_step",
        "one block a multiprocessor is launched: more would only wait longer for each other at the grid's barriers",
    ),
    OneBlock(
        "attention_forward_kernel",
        "with dropout; four warps, which would leave room for a second block, spill there at any tile",
        architectures=(100,),
        tiles=("64: 128×",),
    ),
    OneBlock(
        "attention_backward_query_kernel",
        "training: scores, their gradient and the rotated query stay in registers beside the sums",
        tiles=("128:",),
    ),
    OneBlock(
        "attention_backward_key_value_kernel",
        "training: sums for keys and for values, and both tiles, stay in registers; eight warps share what they read",
    ),
    OneBlock(
        "decode_cross_attention_kernel",
        "64 query rows against each tile: many beams or tokens of one utterance, where matmuls are the limit",
        tiles=("64: 64×", "128: 64×"),
    ),
    OneBlock(
        "decode_cross_attention_kernel",
        "keys and values of 8 bits under a float32 model: what is converted stays in registers; four warps spill",
        dtypes=("fp32",),
        tiles=("128: 16×16×",),
    ),
)


def blocks_at_once(architecture: int, registers: int, shared: int, threads: int) -> int:
    """Returns how many blocks a multiprocessor holds at once; 0 where it cannot hold one.

    architecture: 80, 90 or 100. registers: of a thread. shared: bytes of a block. threads: of a block.
    """
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTS // of_warp * PARTS // warps if of_warp else MOST_BLOCKS
    # the check at a launch takes whole rounds of warps over the parts
    if of_warp * -(-warps // PARTS) * PARTS > REGISTERS:
        by_registers = 0
    of_block = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by_shared = SHARED_MEMORY_OF_ALL[architecture] // of_block
    return min(MOST_BLOCKS, MOST_WARPS // warps, by_registers, by_shared)


def occupancy(row: AuditRow) -> int:
    """Returns the blocks a multiprocessor holds at once of a compiled kernel."""
    return blocks_at_once(row.architecture, row.registers, row.shared, row.threads)


def too_few(row: AuditRow, listed: Sequence[OneBlock] | None = None) -> str | None:
    """Returns in words that a multiprocessor holds too few blocks of a kernel, or None. listed: default ONE_BLOCK."""
    found = occupancy(row)
    if found >= WANTED or (found and not any(word in row.kernel for word in HELD_TO_IT)):
        return None
    if found and any(each.covers(row) for each in (ONE_BLOCK if listed is None else listed)):
        return None
    return (
        f"{found} block{'' if found == 1 else 's'} of {row.threads} threads a multiprocessor, wanted {WANTED}; take a "
        "smaller tile, fewer stages or more warps, or list it with the reason in kernels/audit/occupancy.py"
    )


def stale(rows: Iterable[AuditRow], names: Collection[str], listed: Sequence[OneBlock] | None = None) -> list[str]:
    """Returns in words which exceptions are not needed; one whose kernel is not among the rows may be.

    names: of all kernels there are. listed: default ONE_BLOCK.
    """
    rows = [row for row in rows if not row.error]
    compiled = {row.kernel for row in rows}
    found = []
    for each in ONE_BLOCK if listed is None else listed:
        if each.kernel not in names:
            found.append(f"there is no kernel {each.kernel}, which an exception names")
        elif each.kernel in compiled and not any(each.covers(row) and occupancy(row) < WANTED for row in rows):
            found.append(f"no kernel that an exception for {each.kernel} covers has fewer than {WANTED} blocks")
    return found
