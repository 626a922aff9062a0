"""What a training step should take on a GPU, kind by kind of kernel, worked out and not measured.

In bfloat16 with master weights in float32, packed, forward and backward; the model of `benchmarks.predict`. How many
kernels it launches is counted by what a step of a narrower model dispatches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from benchmarks import rows as rowfile
from benchmarks.predict import H100, Device, Predicted, seconds

if TYPE_CHECKING:
    from benchmarks.train import Training

# bytes of a number in bfloat16 and in float32
HALF, WHOLE = 2, 4
# what a launch costs the host, through Python and autograd; to be checked on a GPU
HOST_SECONDS = 6e-6


def predicted(case: Training) -> list[Predicted]:
    """Returns the kinds of kernels of a step, each with its bytes and operations; launches are not parted."""
    model, attention, shared = (
        case.model,
        case.model.heads * case.model.head_dim,
        case.model.kv_heads * case.model.head_dim,
    )
    sources, targets = case.lengths()
    encoded, decoded = int(sources.sum()), int(targets.sum())
    dim, inner = model.dim, -(-model.inner // 64) * 64
    encoder, decoder = model.source_layers, model.target_layers
    # tokens, inputs, outputs, count
    matmuls = {
        "matmul: queries, keys, values": [
            (encoded, dim, 3 * attention, encoder), (decoded, dim, attention + 2 * shared, decoder),
        ],
        "matmul: cross-attention's query, keys, values": [
            (decoded, dim, attention, decoder), (encoded, dim, 2 * attention, decoder),
        ],
        "matmul: attention's output": [(encoded, attention, dim, encoder), (decoded, attention, dim, 2 * decoder)],
        "matmul: feed-forward": [
            (tokens, *sizes, layers)
            for tokens, layers in ((encoded, encoder), (decoded, decoder))
            for sizes in ((dim, 2 * inner), (inner, dim))
        ],
    }  # fmt: skip
    kinds = []
    for name, each in matmuls.items():
        flops = sum(6.0 * tokens * inputs * outputs * count for tokens, inputs, outputs, count in each)
        # forward, and the gradients of what goes in and of the weights
        moved = sum(
            3.0 * HALF * count * (tokens * (inputs + outputs) + inputs * outputs)
            for tokens, inputs, outputs, count in each
        )
        kinds.append(Predicted(name, 0, moved, flops))
    pairs = encoder * (sources.double() ** 2).sum() + decoder * (targets.double() ** 2).sum() / 2
    pairs = pairs + decoder * (targets.double() * (sources + 1)).sum()
    streamed = (encoded * encoder + 2 * decoded * decoder) * attention
    # backward computes the scores again, and four matmuls beside them
    kinds.append(Predicted("attention", 0, 12.0 * HALF * streamed, 14.0 * attention * float(pairs)))
    normed = encoded * (2 * encoder + 1) + decoded * (3 * decoder + 1)
    kinds.append(Predicted("rms_norm with the residual", 0, HALF * 8.0 * normed * dim))
    kinds.append(Predicted("geglu", 0, HALF * 8.0 * inner * (encoded * encoder + decoded * decoder)))
    logits = decoded * dim * model.vocabulary
    kinds.append(Predicted("cross_entropy", 0, HALF * 3.0 * decoded * dim, 8.0 * logits))
    weights = model.encoder_weights() + model.decoder_weights() + 2 * decoder * dim * attention
    kinds.append(Predicted("weights to bfloat16, their gradients back", 0, 2.0 * (WHOLE + HALF) * weights))
    # reads weight, gradient and two moments, writes weight and moments
    kinds.append(Predicted("AdamW", 0, 7.0 * WHOLE * weights))
    return kinds


def counted(case: Training) -> int:
    """Returns how many kernels a step of the case launches."""
    from benchmarks.train import launches
    from spear_fast import TextToSemantic

    narrow = replace(case.model, dim=64, heads=2, kv_heads=1, head_dim=32, vocabulary=40)
    small = replace(case, model=narrow, batch=3, source=12, target=7, shortest=None)
    model = TextToSemantic(**narrow.model_arguments())
    return launches(model, *small.ids(), torch.bfloat16)


def report(case: Training, device: Device = H100) -> str:
    """Returns the prediction in words and, kind by kind, as a Markdown table."""
    kinds, count = predicted(case), counted(case)
    launching = count * device.launch
    total = seconds(kinds, device) + launching
    hosting = count * HOST_SECONDS
    tokens = sum(int(each.sum()) for each in case.lengths())
    said = (
        f"{case.name}, bfloat16, predicted for one {device.name} and not measured: {rowfile.seconds(total)} a step of "
    )
    said += f"{tokens} tokens, {tokens / total:.0f} tokens/s, "
    said += f"{100 * case.flops() / total / device.gflops / 1e9:.0f} % of the matmuls' limit. {count} launches are "
    said += f"{rowfile.seconds(hosting)} of the host's time: it waits for the GPU "
    if hosting < total:
        said += "in each step, so that a CUDA graph would gain nothing."
    else:
        said += f"from about {1000 * -(-hosting / total * tokens // 1000):.0f} tokens a step on."
    lines = []
    for kind in sorted(kinds, key=lambda each: -each.seconds(device)):
        own = kind.seconds(device)
        by_bytes = kind.bytes / device.gbs >= kind.flops / device.gflops
        lines.append(
            (kind.name, f"{1e3 * own:.2f}", f"{100 * own / total:.0f} %", "bandwidth" if by_bytes else "matmuls")
        )
    lines.append(("launches", f"{1e3 * launching:.2f}", f"{100 * launching / total:.0f} %", ""))
    return f"{said}\n\n{rowfile.table(('kernels', 'ms', 'of the step', 'bound by'), lines)}\n"
