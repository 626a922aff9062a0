"""Generation, ours beside the reference: `python -m benchmarks generate --cases b8-beam4 --rounds 3`.

First the gate: in float32 ours must give the reference's tokens for the very case that is timed. Then both run in turn.
Tokens are output tokens of the returned hypothesis; encoding the source is inside the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows as rowfile
from benchmarks.cases import CASES, Case
from benchmarks.machine import CPU, environment, limits, results_file
from benchmarks.peers import pair
from benchmarks.timing import interleaved, quantiles


def providers() -> dict[str, str]:
    """Returns which provider each decoding op uses for float32 on this machine."""
    from spear_fast.ops import providers as table

    inputs = table.Inputs(torch.device("cpu"), torch.float32, 64)
    return {
        op: next(name for name in table.names(op) if table.get(op, name).function is table.choose(op, inputs))
        for op in ("append_kv", "decode_self_attention", "decode_cross_attention")
    }


def variants_of(case: Case, reference: Any, ours: Any, source: Tensor) -> dict[str, Callable[[], Any]]:
    """Returns what is timed, by name; each call generates the whole batch from its ids."""
    common: dict[str, Any] = dict(source_type="speech", target_type="text", max_length=case.tokens)
    if case.beam == 1:
        # no noise: both then take the likeliest token
        common["temperature"] = 0.0
        return {
            "reference": lambda: reference.generate(source, **common),
            "spear_fast": lambda: ours.generate(source, **common),
        }
    common |= dict(beam_search_decode=True, beam_size=case.beam)
    return {
        "reference": lambda: reference.generate(source, **common),
        "spear_fast": lambda: ours.generate(source, **common),
        "spear_fast standard": lambda: ours.generate(source, beam_mode="standard", **common),
    }


def share_of_equal_tokens(variants: dict[str, Callable[[], Any]]) -> float:
    """Returns the share of tokens that ours has in common with the reference; the call warms both up."""
    theirs, ours = variants["reference"](), variants["spear_fast"]()
    return float((theirs == ours).float().mean()) if theirs.shape == ours.shape else 0.0


def measure(case: Case, rounds: int, *, with_reference: bool = True) -> list[dict[str, Any]]:
    """Returns a row for each variant of a case, timed in turn; raises RuntimeError when the tokens differ."""
    reference, ours = pair(case)
    source = torch.randint(0, case.vocabulary, (case.batch, case.source), generator=torch.Generator().manual_seed(1))
    variants = variants_of(case, reference, ours, source)
    equal = None
    if with_reference:
        equal = share_of_equal_tokens(variants)
        if equal < 1:
            raise RuntimeError(
                f"{case.name}: {equal:.2%} of the tokens are the reference's, wanted all; nothing was timed."
            )
    else:
        del variants["reference"]
    for name, run in variants.items():
        if name != "reference":
            run()
    machine = limits()
    seconds = interleaved(variants, rounds)
    tokens, flops, read = case.batch * case.tokens, case.flops(), case.bytes()
    floors = {"products": flops / machine["gflops"] / 1e9, "bandwidth": read / machine["gbs"] / 1e9}
    bound = max(floors, key=lambda name: floors[name])
    rows = []
    for name, times in seconds.items():
        spread = quantiles(times)
        row = {
            "benchmark": "generate",
            "case": case.name,
            "variant": name,
            "rounds": rounds,
            **{key: round(value, 4) for key, value in spread.items()},
            "tokens_per_second": round(tokens / spread["p50"], 2),
            "gflops": round(flops / spread["p50"] / 1e9, 2),
            "gbs": round(read / spread["p50"] / 1e9, 2),
            "bound": bound,
            "percent_of_limit": round(100 * floors[bound] / spread["p50"], 1),
            "limit": {key: round(value, 1) for key, value in machine.items()},
            "tokens_equal_to_reference": equal,
            "dtype": "float32",
            "providers": providers(),
            "shape": case.shape(),
            **environment(),
        }
        if with_reference:
            # by rounds: both sides of a ratio were measured within one of them
            ratios = [theirs / own for theirs, own in zip(seconds["reference"], times, strict=True)]
            row["times_the_reference"] = {key: round(value, 2) for key, value in quantiles(ratios).items()}
        rows.append(rowfile.finished(row))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| case | variant | seconds p20 / p50 / p80 | tokens/s | of the limit | times the reference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.get("times_the_reference")
        lines.append(
            f"| {row['case']} | {row['variant']} | {row['p20']:.2f} / {row['p50']:.2f} / {row['p80']:.2f} | "
            f"{row['tokens_per_second']:.0f} | {row['percent_of_limit']:.0f} % ({row['bound']}) | "
            f"{'' if ratio is None else format(ratio['p50'], '.1f')} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["b8-beam4", "b8-greedy"], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--without-reference", action="store_true", help="time ours alone; no gate, no ratio")
    parser.add_argument(
        "--out", type=Path, default=None, help="append the rows to this JSONL file, or to the device's in a folder"
    )
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    out = chosen.out
    if out is not None and out.suffix != ".jsonl":
        out = results_file(CPU, out)
    for name in chosen.cases:
        rows = measure(CASES[name], chosen.rounds, with_reference=not chosen.without_reference)
        rowfile.append(out, rows)
        print(table(rows) + "\n", flush=True)
    return 0
