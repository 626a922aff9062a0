"""Generation, ours beside the reference and peers of the same sizes.

    python -m benchmarks generate --cases b8-beam4 b32-beam4 --peers --rounds 3 --threads 2

First the gate: in float32 ours must give the reference's tokens (on a GPU nearly all of them), for the whole batch
where it is small, else for its first utterances; where the reference package is not installed, those of the plain-torch
ops; and the engine those of the standard search. Then all run in turn. Tokens are those of the returned hypothesis;
encoding the source is inside the time. Nobody ends early: a text is as long as its case says. Where texts differ in
length, ours end by a limit of their own, in the engine one by one and in the others as a batch, and CTranslate2's by an
end of sequence there.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows as rowfile
from benchmarks.cases import CASES, CTRANSLATE2_INT8, ENGINE, ENGINE_INT8, REFERENCE, STANDARD, Case
from benchmarks.machine import environment, limits, version
from benchmarks.memory import peak_of_generation
from benchmarks.op import chosen_by_itself
from benchmarks.operations.case import SETS
from benchmarks.options import add_common, device_lost, in_fresh_process, resolved
from benchmarks.timing import interleaved, quantiles
from benchmarks.variants import DISTRIBUTIONS, Generation
from spear_fast import ops
from spear_fast.ops.providers import ProviderQuery

# utterances that the gate looks at where the batch is larger: beside the reference, and of the engine
CHECKED, CHECKED_OF_ENGINE = 2, 4
# share of the tokens that must be equal; on a GPU one matmul rounds otherwise than another, which may turn a tie and
# with it the rest of a row. Rows say how many were
FEWEST_EQUAL = {"cpu": 1.0, "cuda": 0.95}
# nats by which weights of 8 bits may change the log-probability of a likeliest token
MOST_ROUNDING = 0.5
# tokens of each where the engine alone is looked at
CHECKED_TOKENS = 24
DECODING = ("append_kv", "decode_self_attention", "decode_cross_attention")


def providers(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Returns which provider each decoding op uses on this machine."""
    inputs = ProviderQuery(device, dtype, head_dim)
    return {op: chosen_by_itself(op, inputs) for op in DECODING}


def equal_tokens(generation: Generation) -> float:
    """Returns the share of tokens that are those of the reference or else of the plain-torch ops."""
    case = generation.case
    rows = list(range(case.batch if case.batch <= 8 and REFERENCE in case.peers else CHECKED))[: case.batch]
    ours = generation.generate(generation.ours, rows)
    if generation.reference is not None:
        theirs = generation.generate(generation.reference, rows)
    else:
        with ops.forced("*=reference"):
            theirs = generation.generate(generation.ours, rows)
    return _equal(ours, theirs)


def equal_in_engine(generation: Generation) -> float:
    """Returns the share of the engine's tokens that are those of the standard search, each utterance on its own.

    Where utterances differ in length the engine has half the slots, so that slots are taken over.
    """
    rows = list(range(generation.case.batch))[:CHECKED_OF_ENGINE]
    slots = -(-len(rows) // 2) if generation.case.ends else len(rows)
    both = zip(generation.by_engine(rows, slots)(), generation.standard(rows), strict=True)
    equal = [_equal(ours, theirs) for ours, theirs in both]
    return sum(equal) / len(equal)


def check_engine(case: Case, device: torch.device) -> None:
    """Raises RuntimeError where the engine, in float32, has other tokens for a model and sources than plain torch has.

    A few tokens of a few utterances, once for each model and number of beams.
    """
    tokens, batch = min(case.tokens, CHECKED_TOKENS), min(case.batch, CHECKED_OF_ENGINE)
    _check_engine(replace(case, name="", batch=batch, slots=batch, tokens=tokens, sets=(), peers=(), wanted={}), device)


@functools.cache
def _check_engine(case: Case, device: torch.device) -> None:
    generation = Generation(case, device, reference=False)
    share = min(equal_tokens(generation), equal_in_engine(generation))
    if share < FEWEST_EQUAL[device.type]:
        raise RuntimeError(
            f"{share:.2%} of the engine's tokens are right, wanted {FEWEST_EQUAL[device.type]:.0%}; nothing was timed."
        )


def _equal(ours: Tensor, theirs: Tensor) -> float:
    # an engine's results are on the CPU, wherever it runs
    return float((theirs.cpu() == ours.cpu()).float().mean()) if theirs.shape == ours.shape else 0.0


def measure(
    case: Case,
    rounds: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    peers: bool,
    quick: bool = False,
    engine_only: bool = False,
) -> tuple[list[rowfile.Row], list[str]]:
    """Returns a row for each variant of a case, timed in turn, and why others have none.

    peers: all that the case names, else the reference alone. engine_only: of our own ways the engine alone.

    Raises RuntimeError when the tokens are not those that they must be.
    """
    # the reference takes long: on a GPU only where it is measured too
    generation = Generation(case, device, reference=device.type == "cpu" or REFERENCE in case.peers)
    equal = {"generate": equal_tokens(generation), "engine": equal_in_engine(generation)}
    if min(equal.values()) < FEWEST_EQUAL[device.type]:
        shares = ", ".join(f"{share:.2%} by {name}" for name, share in equal.items())
        raise RuntimeError(
            f"{case.name}: of the tokens are right {shares}, wanted {FEWEST_EQUAL[device.type]:.0%}; nothing was timed."
        )
    del generation
    generation = Generation(case, device, dtype, reference=REFERENCE in case.peers)
    variants = {ENGINE: generation.by_engine()} if engine_only else generation.own()
    others, missing = generation.peers(case.peers if peers else [each for each in case.peers if each == REFERENCE])
    variants |= others
    rounding = generation.rounding(range(case.batch)[:CHECKED_OF_ENGINE]) if ENGINE_INT8 in variants else 0.0
    if rounding > MOST_ROUNDING:
        raise RuntimeError(
            f"{case.name}: weights of 8 bits change a log-probability by {rounding:.2f} nats, wanted at most "
            f"{MOST_ROUNDING}; nothing was timed."
        )
    with torch.inference_mode():
        for decode in variants.values():
            decode()
        machine = limits(device, dtype, quick=quick)
        seconds = interleaved(variants, rounds)
    versions = {name: version(name) for name in sorted({DISTRIBUTIONS[peer] for peer in others})}
    tokens, size = sum(generation.texts), torch.finfo(dtype).bits // 8
    flops, read = case.flops(), case.bytes(size)
    floors = {"matmuls": flops / machine["gflops"] / 1e9, "bandwidth": read / machine["gbs"] / 1e9}
    bound = max(floors, key=lambda name: floors[name])
    chosen, rows = providers(device, dtype, case.head_dim), []
    for name, times in seconds.items():
        spread = quantiles(times)
        row: dict[str, Any] = {
            "benchmark": "generate",
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "rounds": rounds,
            **{key: float(f"{value:.4g}") for key, value in spread.items()},
            "tokens_per_second": round(tokens / spread["p50"], 2),
            "gflops": round(flops / spread["p50"] / 1e9, 2),
            "gbs": round(read / spread["p50"] / 1e9, 2),
            "bound": bound,
            "percent_of_roofline": round(100 * floors[bound] / spread["p50"], 1),
            "limit": {key: round(value, 1) for key, value in machine.items()},
            "equal_tokens": equal["engine" if name == ENGINE else "generate"],
            "providers": chosen,
            "versions": versions,
            "shape": case.shape(),
            **environment(device),
        }
        # by rounds: both sides of a ratio were measured within one of them
        row["times"] = {
            peer: {key: round(value, 3) for key, value in quantiles(ratios).items()}
            for peer in others
            for ratios in [[a / b for a, b in zip(seconds[peer], times, strict=True)]]
        }
        if name == ENGINE_INT8:
            # no tokens of its own to be equal with: what 8 bits change is said in nats
            row |= {"equal_tokens": None, "rounding_nats": round(rounding, 4)}
        wanted = {
            peer: times
            for peer, times in case.wanted.items()
            if peer in row["times"] and (peer == CTRANSLATE2_INT8) == (name == ENGINE_INT8)
        }
        # in batches of mixed lengths, utterances run until the last one's end: the engine is what is aimed with
        if wanted and name not in others and (name in (ENGINE, ENGINE_INT8) or not case.ends):
            row |= {"wanted": wanted, "reached": all(row["times"][peer]["p50"] >= wanted[peer] for peer in wanted)}
        rows.append(rowfile.finished(row))
    return rows, [f"{case.name}: {reason}" for reason in missing]


def measure_memory(case: Case, variant: str, device: torch.device, dtype: torch.dtype) -> rowfile.Row:
    """Returns a row with the most bytes that a beam search of a case held, and those that it must hold."""
    peak, needed = peak_of_generation(case, variant, device, dtype), case.memory(torch.finfo(dtype).bits // 8)
    row = {
        "benchmark": "generate memory",
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "variant": variant,
        "peak_bytes": peak,
        "needed_bytes": needed,
        "times_needed": round(peak / needed, 3),
        "wanted": {"times_needed": 1.3},
        "reached": peak <= 1.3 * needed,
        "shape": case.shape(),
        **environment(device),
    }
    return rowfile.finished(row)


def table(rows: Sequence[rowfile.Row]) -> str:
    """Returns the rows as a Markdown table."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["times"]))
    header = ("case", "variant", "p20 / p50 / p80", "tokens/s", "of the roofline", *(f"× {peer}" for peer in peers), "")
    return rowfile.table(header, (_line(row, peers) for row in rows))


def _line(row: rowfile.Row, peers: Sequence[str]) -> list[str]:
    said = ""
    if "wanted" in row:
        said = ("reached " if row["reached"] else "MISSED ") + ", ".join(
            f"{n:g} × {p}" for p, n in row["wanted"].items()
        )
    return [
        f"{row['case']}, {row['dtype']}",
        row["variant"],
        " / ".join(rowfile.seconds(row[name]) for name in ("p20", "p50", "p80")),
        f"{row['tokens_per_second']:.0f}",
        f"{row['percent_of_roofline']:.0f} % ({row['bound']})",
        *(f"{row['times'][peer]['p50']:.2f}" if peer in row["times"] else "" for peer in peers),
        said,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--set", choices=SETS, dest="kind", help="all cases of a set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="CTranslate2 and transformers too, beside the reference")
    parser.add_argument("--engine-only", action="store_true", help="of our own ways the engine alone")
    parser.add_argument("--memory", action="store_true", help="the most memory held instead of the time")
    add_common(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    where = resolved(chosen)
    kind = chosen.kind or ("cpu" if where.device.type == "cpu" else "gpu")
    cases = [CASES[name] for name in chosen.cases or ()] or [case for case in CASES.values() if kind in case.sets]
    status = 0
    for i, case in enumerate(cases[chosen.skip :], start=chosen.skip):
        if not where.left():
            print(f"{case.name}: not begun, the {chosen.limit:g} seconds are over", flush=True)
            continue
        if chosen.memory:
            for variant in (ENGINE, STANDARD) if case.beam > 1 else (ENGINE,):
                row = measure_memory(case, variant, where.device, where.dtype)
                rowfile.append(where.out, [row])
                held = f"{row['peak_bytes'] / 1e6:.0f} MB, {row['times_needed']:.2f} times what must be held"
                print(f"{case.name}, {variant}: {held}", flush=True)
            continue
        try:
            rows, missing = measure(
                case,
                chosen.rounds,
                device=where.device,
                dtype=where.dtype,
                peers=chosen.peers,
                quick="tiny" in case.sets,
                engine_only=chosen.engine_only,
            )
        except Exception as error:
            # one case must not take the others with it
            print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
            status = 1
            if device_lost(where.device):
                return in_fresh_process("generate", given, i + 1, where)
            continue
        rowfile.append(where.out, rows)
        print("\n".join([*(f"not timed: {reason}" for reason in missing), table(rows), ""]), flush=True)
    return status
