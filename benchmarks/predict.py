"""What a decoding step should take on a GPU, kernel by kernel, worked out and not measured.

A kernel takes as long as its bytes at the memory's speed or its operations at the matmuls', whichever is more, and what
a launch costs inside a CUDA graph; `beam_step` as long as one of its blocks. Caches are not modelled, nor other kernels
that do not fill the GPU: what is measured beside it says which assumption is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import rows as rowfile
from benchmarks.cases import Case
from benchmarks.predict_selection import BLOCKS, beam_step_cycles
from spear_fast.decoding import KvDtype
from spear_fast.decoding.packed.linear import ALIGNMENT
from spear_fast.ops.decode_cross_attention import FEW_ROWS


@dataclass(frozen=True)
class Device:
    """gbs: gigabytes a second of a large copy. gflops: of a large matmul in halves. launch, barrier: seconds of one.

    launch: what one costs inside a graph (Hazy Research, "Look Ma, No Bubbles!", 2025: 1.3 µs on an H100). barrier: of
    all blocks of a launch, and the memory's latency before and after it; assumed to be no dearer than a launch.
    gflops_alone: without matrix instructions, where as many others load and convert.
    launch: what one costs inside a graph (Hazy Research, "Look Ma, No Bubbles!", 2025: 1.3 µs on an H100).
    clock: cycles a second. multiprocessors: how many there are.
    """

    name: str
    gbs: float
    gflops: float
    launch: float = 1.3e-6
    barrier: float = 1.3e-6
    gflops_alone: float = 30e3
    clock: float = 1.755e9
    multiprocessors: int = 132


# what an H100 SXM reaches of its data sheet's 3.35 TB/s and 989 TFLOP/s
H100 = Device("H100", 3.0e3, 800e3)


@dataclass(frozen=True)
class Predicted:
    """One kind of kernel of a step: launches, and bytes and operations of all of them together.

    cycles: what a block does and waits for one after the other. blocks: how many there are; at_once: that a
    multiprocessor holds.
    """

    name: str
    launches: int
    bytes: float
    flops: float = 0.0
    cycles: float = 0.0
    blocks: int = 0
    at_once: int = 1

    def seconds(self, device: Device) -> float:
        return max(self.work(device), self.waits(device)) + self.launches * device.launch

    def work(self, device: Device) -> float:
        """Returns the seconds that its bytes or its operations take."""
        return max(self.bytes / device.gbs, self.flops / device.gflops) / 1e9

    def waits(self, device: Device) -> float:
        """Returns the seconds that its blocks take, as many side by side as there is room for."""
        return -(-self.blocks // (device.multiprocessors * self.at_once)) * self.cycles / device.clock


def predicted(case: Case, generated: int, size: int = 2, source_size: int | None = None) -> list[Predicted]:
    """Returns the kernels of the step after `generated` tokens, in their order in a layer.

    size: bytes of a number. source_size: of one of cross-attention's keys and values, where they are held otherwise.
    """
    layers, rows, dim = case.target_layers, case.batch * case.beam, case.dim
    attention, shared = case.heads * case.head_dim, 2 * case.kv_heads * case.head_dim
    # with the column that holds the last bias
    inner = -(-(case.inner + 1) // ALIGNMENT) * ALIGNMENT
    work = case.step(generated, size)
    # scales, one for each head of a source, are left out
    cross = work.cross if source_size is None else work.cross * source_size / size

    def matmul(name: str, inputs: int, outputs: int, *, adds: bool = False, count: int = layers) -> Predicted:
        moved = inputs * outputs + rows * (inputs + outputs * (2 if adds else 1))
        return Predicted(name, count, size * count * moved, 2.0 * count * rows * inputs * outputs)

    def moving(name: str, numbers: int, count: int = layers) -> Predicted:
        return Predicted(name, count, float(size * count * rows * numbers))

    heads = 4.0 * layers * rows * attention
    return [
        moving("embedding", 2 * dim, 1),
        matmul("matmul: queries, keys, values", dim, attention + shared),
        Predicted(
            "decode_self_attention",
            layers,
            # reads queries, what is new and the rows that make up for the norm, writes what is new and the result
            work.own + size * layers * rows * (2 * (attention + shared) + dim),
            heads * (generated + 1),
        ),
        matmul("matmul: self-attention's output", attention, dim, adds=True),
        matmul("matmul: cross-attention's query", dim, attention),
        Predicted(
            "decode_cross_attention",
            layers,
            cross + size * layers * rows * (2 * attention + dim),
            heads * (case.source + 1),
        ),
        matmul("matmul: cross-attention's output", attention, dim, adds=True),
        matmul("matmul: feed-forward, up and gate", dim, 2 * inner),
        moving("geglu", 3 * inner + dim),
        matmul("matmul: feed-forward, down", inner, dim, adds=True),
        moving("rms_norm", 2 * dim, 1),
        matmul("matmul: logits", dim, case.vocabulary, count=1),
        Predicted("lengths", 1, 16.0 * rows),
        _selection(case, work.selection),
    ]


def _selection(case: Case, bytes: float) -> Predicted:
    if case.beam == 1:
        return Predicted("sample_step", 1, bytes)
    cycles = beam_step_cycles(case.beam, case.vocabulary)
    return Predicted("beam_step", 1, bytes, cycles=cycles, blocks=case.batch, at_once=BLOCKS)


def seconds(kernels: Sequence[Predicted], device: Device = H100) -> float:
    """Returns what a step of these kernels should take, one after the other."""
    return sum(kernel.seconds(device) for kernel in kernels)


def seconds_together(case: Case, generated: int, device: Device = H100) -> float | None:
    """Returns what a step of few rows should take in one launch, selection aside, in 16 bits; None of more rows.

    Its phases read what the kernels of the step do, and nothing that passes between them leaves the device's cache: the
    roofline, or the operations without matrix instructions if they take longer, and what it costs that all blocks wait
    for each other: once at first and eight times a layer.
    """
    if case.batch * case.beam > FEW_ROWS:
        return None
    work = case.step(generated)
    own = max(work.floor(device.gbs, device.gflops), work.flops / device.gflops_alone / 1e9)
    return own + (1 + 8 * case.target_layers) * device.barrier


def report(case: Case, generated: int, device: Device = H100, kv_dtype: KvDtype = "exact") -> str:
    """Returns the prediction in words and, kernel by kernel, as a Markdown table; the roofline is that of bfloat16."""
    held = "" if kv_dtype == "exact" else f", keys and values of the source in {kv_dtype}"
    kernels = predicted(case, generated, source_size=None if kv_dtype == "exact" else 1)
    total, floor = seconds(kernels, device), case.step(generated).floor(device.gbs, device.gflops)
    launches = sum(kernel.launches for kernel in kernels)
    said = f"{case.name}, bfloat16{held}, after {generated} tokens, predicted for one {device.name} and not measured: "
    said += f"{rowfile.seconds(total)} a step, {100 * floor / total:.0f} % of the roofline's {rowfile.seconds(floor)}; "
    said += f"{launches} launches, {100 * launches * device.launch / total:.0f} % of the time"
    together = seconds_together(case, generated, device) if kv_dtype == "exact" else None
    if together is not None:
        said += "; as it is done for so few hypotheses, in one launch and one for the selection, "
        said += f"{rowfile.seconds(together + kernels[-1].seconds(device))} a step"
    lines = []
    for kernel in sorted(kernels, key=lambda each: -each.seconds(device)):
        own = kernel.seconds(device)
        by_bytes = kernel.bytes / device.gbs >= kernel.flops / device.gflops
        bound = "bandwidth" if by_bytes else "matmuls"
        bound = "latency" if kernel.waits(device) > kernel.work(device) else bound
        bound = "launches" if kernel.launches * device.launch > own / 2 else bound
        lines.append((kernel.name, f"{kernel.launches}", f"{1e6 * own:.1f}", f"{100 * own / total:.0f} %", bound))
    return f"{said}\n\n{rowfile.table(('kernel', 'launches', 'µs', 'of the step', 'bound by'), lines)}\n"
