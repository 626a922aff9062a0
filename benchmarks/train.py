"""A training step, forward, backward and AdamW, of this package's model and of the reference's on the same batch.

    python -m benchmarks train --threads 2
    python -m benchmarks train --predict

Each steps as its own trainers do: this package's packs the batch, and its AdamW is one pass over the weights; also with
each layer computed a second time for the gradients (`checkpoint_activations`). Memory is the most that a fresh process
holds in two steps.

The gate: in float32 both have the same loss, and gradients that differ by rounding alone; where the reference is
not installed, ours on the plain-torch ops. On a GPU the gate looks at the first rows, since float64 takes long there.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from launches import CountLaunches
from tolerance import GRADIENTS, allowed_error, to_float64
from torch import Tensor

from benchmarks import predict_training
from benchmarks import rows as rowfile
from benchmarks.cases import OURS, REFERENCE, Case
from benchmarks.machine import environment, limits
from benchmarks.memory import peak_of_training
from benchmarks.operations.case import SETS, mixed_lengths
from benchmarks.options import add_common, device_lost, in_fresh_process, resolved
from benchmarks.peers import lively_, pair, reference
from benchmarks.timing import interleaved, quantiles
from spear_fast import TextToSemantic, ops
from spear_fast.training.accelerated import use_half_residual
from spear_fast.training.optimizer import make_optimizer

# rows of a batch that the gate looks at on a GPU
CHECKED = 4
CHECKPOINTED = f"{OURS}, checkpointed"


@dataclass(frozen=True)
class Training:
    """A model and a batch: `batch` sources of up to `source` ids, and texts of up to `target`; all lengths differ.

    shortest: of both; a fifth of the longest where it is left out. dense: all are as long as the longest.
    wanted: what is aimed at: times as fast as the reference, and the most of its memory.
    """

    name: str
    model: Case
    batch: int
    source: int
    target: int
    sets: tuple[str, ...]
    shortest: int | None = None
    dense: bool = False
    wanted: Mapping[str, float] = field(default_factory=dict, hash=False)

    def lengths(self) -> tuple[Tensor, Tensor]:
        return self._lengths(self.source, 2), self._lengths(self.target, 3)

    def _lengths(self, longest: int, seed: int) -> Tensor:
        if self.dense:
            return torch.full((self.batch,), longest)
        if self.shortest is None:
            return mixed_lengths(self.batch, longest, torch.device("cpu"))
        spread = torch.linspace(self.shortest, longest, self.batch).round().long()
        return spread[torch.randperm(self.batch, generator=torch.Generator().manual_seed(seed))]

    def ids(self) -> tuple[Tensor, Tensor]:
        """Returns source and target ids, padded with -1 and 0 as the models pad, on the CPU."""
        generator = torch.Generator().manual_seed(4)
        padded = []
        for longest, lengths, pad in zip((self.source, self.target), self.lengths(), (-1, 0), strict=True):
            ids = torch.randint(1, self.model.vocabulary, (self.batch, longest), generator=generator)
            padded.append(ids.masked_fill_(torch.arange(longest) >= lengths[:, None], pad))
        return padded[0], padded[1]

    def flops(self) -> float:
        """Floating-point operations of the step without padding: backward is twice forward."""
        model, attention, total = self.model, self.model.heads * self.model.head_dim, 0.0
        for source, target in zip(*(each.tolist() for each in self.lengths()), strict=True):
            total += 2 * source * model.encoder_weights() + 4 * model.source_layers * source**2 * attention
            total += 2 * target * model.decoder_weights() + 2 * model.target_layers * target**2 * attention
            total += 4 * source * model.target_layers * model.dim * attention
            total += 4 * model.target_layers * target * (source + 1) * attention
        return 3 * total


_SMALL = dict(source_layers=1, target_layers=1, dim=32, heads=2, head_dim=16, vocabulary=40)
_LARGE = dict(dim=1024, source_layers=12, target_layers=12, heads=16)
CASES = (
    Training("tiny b3", Case("tiny", **_SMALL), 3, 12, 7, ("tiny",)),  # type: ignore[arg-type]
    Training("512x6 b8", Case("512x6"), 8, 250, 64, ("cpu",)),
    Training("512x6 b8 dense", Case("512x6"), 8, 250, 64, ("cpu",), dense=True, wanted={"times": 1.5}),
    Training(
        "512x6 b8 50-500", Case("512x6"), 8, 500, 500, ("cpu",), shortest=50, wanted={"times": 2.0, "memory": 0.6}
    ),
    Training("512x6 b32", Case("512x6"), 32, 500, 100, ("gpu",)),
    Training("512x6 b32 50-500", Case("512x6"), 32, 500, 500, ("gpu",), shortest=50),
    Training("1024x12 b32", Case("1024x12", **_LARGE), 32, 500, 100, ("gpu",)),  # type: ignore[arg-type]
    Training("1024x12 b32 50-500", Case("1024x12", **_LARGE), 32, 500, 500, ("gpu",), shortest=50),  # type: ignore[arg-type]
)


def loss_of(model: Any, source: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the loss of a batch; in other types than float32 and float64 under autocast."""
    device = next(model.parameters()).device
    if not isinstance(model, TextToSemantic):
        # ours takes ids from the host, where it packs them
        source, target = source.to(device), target.to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype not in (torch.float32, torch.float64))
    # the reference looks for pads in text alone, and in speech takes a mask
    with autocast:
        return model(
            source.clamp(min=0), target, source_type="speech", target_type="text", source_mask=source >= 0,
            return_loss=True,
        )  # fmt: skip


def gradients(model: Any, source: Tensor, target: Tensor) -> list[Tensor]:
    """Returns the loss and the gradient of every parameter, zeros where it plays no part."""
    model.train()
    parameters = [each for _, each in sorted(model.named_parameters()) if each.requires_grad]
    dtype = next(each.dtype for each in parameters)
    loss = loss_of(model, source, target, dtype)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))]


def check(ours: Any, reference: Any | None, source: Tensor, target: Tensor) -> float:
    """Returns the largest error of loss and gradients over the allowed one, by the tests' rule.

    reference: without it, ours on the plain-torch ops. Raises RuntimeError where the error is above the allowed one.
    """
    mine = gradients(ours, source, target)
    other, within = (reference, nullcontext()) if reference is not None else (ours, ops.forced("*=reference"))
    other = copy.deepcopy(other)
    with within:
        theirs = gradients(other, source, target)
        truths = [to_float64(each) for each in gradients(other.double(), source, target)]
    worst = 0.0
    # all gradients together: a single bias may be exact by chance
    for name, own, other, truth in (
        ("loss", mine[:1], theirs[:1], truths[:1]),
        ("gradients", mine[1:], theirs[1:], truths[1:]),
    ):
        flat_own, flat_other, flat_truth = (torch.cat([t.flatten() for t in each]) for each in (own, other, truth))
        error = (flat_own.double() - flat_truth).abs().max().item()
        share = error / allowed_error(flat_truth, flat_other, factor=GRADIENTS)
        if not share <= 1:
            raise RuntimeError(f"the {name} are off by {share:.2f} times what is allowed; nothing was timed.")
        worst = max(worst, share)
    return worst


def stepper(model: Any, source: Tensor, target: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a training step, with the optimizer that the model's trainers take."""
    model.train()
    parameters = list(model.parameters())
    if isinstance(model, TextToSemantic):
        use_half_residual(model, "bf16" if dtype == torch.bfloat16 else "no")
        optimizer = make_optimizer(parameters, 1e-4, 1e-2)
    else:
        matrices, others = ([each for each in parameters if (each.ndim >= 2) is wide] for wide in (True, False))
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-2, betas=(0.9, 0.99))

    def step() -> None:
        loss_of(model, source, target, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def checkpointed(model: Any) -> Any:
    """Returns the model, which from now on keeps each layer's input alone."""
    for transformer in (model.source_transformer, model.target_transformer):
        transformer.checkpoint_activations = True
    return model


def variant_stepper(case: Training, variant: str, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a training step of one variant alone, for its memory."""
    if variant == REFERENCE:
        model: Any = lively_(reference(case.model, device))
    else:
        with device:
            model = lively_(TextToSemantic(**case.model.model_arguments()))
        if variant == CHECKPOINTED:
            checkpointed(model)
    return stepper(model, *case.ids(), dtype)


def launches(model: Any, source: Tensor, target: Tensor, dtype: torch.dtype) -> int:
    """Returns how many kernels a step launches on a GPU, counted by what is dispatched."""
    step = stepper(model, source, target, dtype)
    # the first one makes the optimizer's state
    step()
    with CountLaunches() as mode:
        step()
    return mode.total


def measure(case: Training, rounds: int, *, device: torch.device, dtype: torch.dtype, quick: bool) -> list[rowfile.Row]:
    """Returns a row for each model, timed in turn."""
    other, ours = pair(case.model, device=device)
    models = {OURS: ours, CHECKPOINTED: checkpointed(copy.deepcopy(ours))}
    models |= {} if other is None else {REFERENCE: other}
    source, target = case.ids()
    few = slice(None if device.type == "cpu" else CHECKED)
    share = round(check(models[OURS], models.get(REFERENCE), source[few], target[few]), 3)
    peaks = {name: peak_of_training(case.name, name, device, dtype) for name in models}
    counts = {name: launches(copy.deepcopy(model), source[:2], target[:2], dtype) for name, model in models.items()}
    steps = {name: stepper(model, source, target, dtype) for name, model in models.items()}
    machine = limits(device, dtype, quick=quick)
    seconds = interleaved(steps, rounds)
    tokens, flops, rows = sum(int(each.sum()) for each in case.lengths()), case.flops(), []
    for name, times in seconds.items():
        spread = quantiles(times)
        row: dict[str, Any] = {
            "benchmark": "train",
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "rounds": rounds,
            **{key: float(f"{value:.4g}") for key, value in spread.items()},
            "tokens_per_second": round(tokens / spread["p50"], 1),
            "flops": flops,
            "mfu": round(100 * flops / spread["p50"] / 1e9 / machine["gflops"], 1),
            "limit": {key: round(value, 1) for key, value in machine.items()},
            "peak_bytes": peaks[name],
            "launches": counts[name],
            "error_of_allowed": share,
            "shape": {**asdict(case), "model": case.model.shape()},
            **environment(device),
        }
        if REFERENCE in seconds:
            ratios = [a / b for a, b in zip(seconds[REFERENCE], times, strict=True)]
            row["times"] = {REFERENCE: {key: round(value, 3) for key, value in quantiles(ratios).items()}}
            row["memory_of"] = {REFERENCE: round(peaks[name] / peaks[REFERENCE], 3)}
            if name == OURS and case.wanted:
                row["wanted"] = dict(case.wanted)
        rows.append(rowfile.finished(row))
    return rows


def table(rows: Sequence[rowfile.Row]) -> str:
    """Returns the rows as a Markdown table."""
    header = ("case", "variant", "p20 / p50 / p80", "tokens/s", "MFU", "memory", "launches", f"× {REFERENCE}")
    return rowfile.table(
        header,
        (
            (
                f"{row['case']}, {row['dtype']}",
                row["variant"],
                " / ".join(rowfile.seconds(row[name]) for name in ("p20", "p50", "p80")),
                f"{row['tokens_per_second']:.0f}",
                f"{row['mfu']:.0f} %",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                str(row["launches"]),
                f"{row['times'][REFERENCE]['p50']:.2f}" if "times" in row else "",
            )
            for row in rows
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench train", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", metavar="CASE", choices=[case.name for case in CASES])
    parser.add_argument("--set", choices=SETS, dest="kind", help="all cases of a set")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--predict", action="store_true", help="measure nothing: print what a step should take on an H100, by a model"
    )
    add_common(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    if chosen.predict:
        for case in CASES:
            if case.name in chosen.cases if chosen.cases else (chosen.kind or "gpu") in case.sets:
                print(predict_training.report(case), flush=True)
        return 0
    where = resolved(chosen)
    kind = chosen.kind or ("cpu" if where.device.type == "cpu" else "gpu")
    status = 0
    named = [case for case in CASES if (case.name in chosen.cases if chosen.cases else kind in case.sets)]
    for i, case in enumerate(named[chosen.skip :], start=chosen.skip):
        if not where.left():
            print(f"{case.name}: not begun, the {chosen.limit:g} seconds are over", flush=True)
            continue
        try:
            quick = "tiny" in case.sets
            rows = measure(case, chosen.rounds, device=where.device, dtype=where.dtype, quick=quick)
        except Exception as error:
            # one case must not take the others with it
            print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
            status = 1
            if device_lost(where.device):
                return in_fresh_process("train", given, i + 1, where)
            continue
        rowfile.append(where.out, rows)
        print(table(rows) + "\n", flush=True)
    return status
