"""A decoding step of few rows by csrc/cuda/fused_step.cu: all layers and the logits in one cooperative launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.fused import LAYERS
from spear_fast.decoding.state import DecodeState
from spear_fast.ops import backends
from spear_fast.ops.cuda import runtime, sources
from spear_fast.ops.cuda.runtime import SCALARS, Launch
from spear_fast.ops.decode_cross_attention import FEW_ROWS, step_arrivals
from spear_fast.ops.reference import ranges

SOURCE, STRUCT = "fused_step.cu", "FusedStep"
# as in the sources: threads of a block, positions of the history that make a part
THREADS, HISTORY_PART = 256, 64
# for how many rows, at most, there is a kernel
ROWS = (1, 4, 8, FEW_ROWS)
# weights times rows, at most: they are multiplied without matrix instructions, and by the model of `bench step
# --predict` more of them take longer than the launches that are saved
MULTIPLICATIONS = 2_000_000_000


def fits(decoder: Decoder, state: DecodeState) -> bool:
    """Returns whether the kernel takes such a step: few rows, and buffers as it reads them."""
    weights, rows, memory = decoder.cuda_weights, state.lengths.numel(), state.memory
    if weights is None or not 0 < rows <= FEW_ROWS or rows * weights.numbers > MULTIPLICATIONS or ranges.DEBUG:
        return False
    caches = (*state.keys, *state.values)
    *others, last = memory.store.stride()
    return (
        all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in caches)
        and all(each.is_contiguous() for each in (state.inputs, state.lengths, state.ancestors, memory.lengths))
        and memory.store.dtype == decoder.dtype
        and memory.store.data_ptr() % 16 == 0
        and last == 1
        and all(stride % 8 == 0 for stride in others)
        and memory.arrivals is not None
        and len(memory.arrivals) >= step_arrivals(decoder.heads)
    )


@functools.cache
def blocks_on(device: torch.device) -> int:
    """Returns how many blocks a launch has: one for each multiprocessor, so that all are there at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_step(decoder: Decoder, state: DecodeState) -> Tensor:
    """Returns what `decode_step` does, in one launch; `fits` must hold.

    Raises RuntimeError where the launch is refused, before anything is written.
    """
    rows, heads, size = state.lengths.numel(), decoder.heads, decoder.head_dim
    memory, weights = state.memory, decoder.cuda_weights
    assert weights is not None
    assert memory.arrivals is not None
    source = memory.store.shape[4]
    split = memory.split or source + 1
    parts = max(-(-state.capacity // HISTORY_PART), -(-(source + 1) // split))
    scratch = decoder.embedding.new_empty
    logits = scratch(rows, decoder.vocab_size)
    tensors = {
        "hidden": scratch(rows, decoder.dim, dtype=torch.float32),
        "projected": scratch(rows, heads + 2 * decoder.kv_heads, size, dtype=torch.float32),
        "attended": scratch(rows, heads, size),
        "activations": scratch(rows, weights.inner),
        "partial": scratch(rows, heads, parts, size + 2, dtype=torch.float32),
        "logits": logits,
        "weights": weights.table,
        "embedding": decoder.embedding,
        "logits_weight": decoder.logits.weight,
        "inputs": state.inputs,
        "lengths": state.lengths,
        "ancestors": state.ancestors,
        "memory": memory.store,
        "memory_lengths": memory.lengths,
        "counters": memory.arrivals,
    }
    values = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    values["final_gamma"] = 0 if decoder.final_gamma is None else decoder.final_gamma.data_ptr()
    for name, buffers in (("keys", state.keys), ("values", state.values)):
        values |= {f"{name}{i}": buffers[i].data_ptr() if i < len(buffers) else 0 for i in range(LAYERS)}
    values |= {"layers": len(decoder.layers), "rows": rows, "sourced": state.inputs.numel(), "beams": state.beams}
    values |= {"dim": decoder.dim, "heads": heads, "groups": decoder.kv_heads, "size": size, "inner": weights.inner}
    values |= {"vocab": decoder.vocab_size, "embeddings": len(decoder.embedding), "capacity": state.capacity}
    values |= {"source": source, "split": split}
    axes = ("layer", "value", "utterance", "head", "position")
    values |= {f"memory_{axis}": stride for axis, stride in zip(axes, memory.store.stride(), strict=False)}
    _launch(next(each for each in ROWS if each >= rows), values, decoder)
    return logits


def _launch(rows: int, values: dict[str, int], decoder: Decoder) -> None:
    """Launches the kernel for up to so many rows, of the extension or by CuPy."""
    blocks = blocks_on(decoder.device)
    if backends.cuda_is_native():
        fields = [values[name] for name in sources.fields(SOURCE, STRUCT)]
        torch.ops.spear_fast.launch_fused_step(decoder.embedding, fields, blocks, rows)
        return
    kernel = f"spear_fast::fused_step<{SCALARS[decoder.dtype]}, {rows}>"
    runtime.launch(Launch(SOURCE, kernel, STRUCT, blocks, THREADS, cooperative=True), values, decoder.device)
