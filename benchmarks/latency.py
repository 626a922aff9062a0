"""How soon a client hears something: the time to the first token and between tokens, of requests that stream.

    python -m benchmarks latency --requests 1 8 32 --threads 2

A number of clients ask one engine at random moments, spread over the time that one request takes when it is alone, so
that nearly all are in flight together; each reads its tokens by `async for`. The clock of a request starts when it is
submitted: waiting for a slot and encoding are inside. Nobody ends early. First the gate: what was streamed is the
request's result. "whole" is what a client waits that does not stream.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import rows as rowfile
from benchmarks.cases import Case
from benchmarks.machine import environment
from benchmarks.operations.case import SETS
from benchmarks.options import add_common, device_lost, in_fresh_process, resolved
from benchmarks.timing import quantile
from benchmarks.variants import Generation
from spear_fast import DecodingOptions

# ten seconds of speech at 25 tokens a second, from a sentence
CASES = {
    case.name: case
    for case in (
        Case("speak 512x6", beam=1, source=100, tokens=250, sets=("cpu", "gpu")),
        Case(
            "speak tiny", dim=64, source_layers=2, target_layers=2, heads=4, head_dim=16, vocabulary=50, beam=1,
            source=20, tokens=12, sets=("tiny",),
        ),
    )
}  # fmt: skip
# of a model with random weights the hypotheses of a search agree on nothing before the end
METHODS = {
    "greedy": DecodingOptions(method="greedy", max_length=1),
    "sample": DecodingOptions(method="sample", max_length=1),
}


@dataclass
class Heard:
    """What one client saw: seconds from submitting to each token, and to the result."""

    tokens: list[float] = field(default_factory=list)
    whole: float = 0.0


async def _client(engine: Any, source: Any, options: DecodingOptions, delay: float) -> Heard:
    await asyncio.sleep(delay)
    began, heard, got = time.perf_counter(), Heard(), []
    request = engine.submit(source, options, stream=True)
    async for token in request:
        heard.tokens.append(time.perf_counter() - began)
        got.append(token)
    heard.whole = time.perf_counter() - began
    if got != request.result().tokens[0, 0, : int(request.result().lengths[0, 0])].tolist():
        raise RuntimeError("what was streamed is not the result; nothing is reported.")
    return heard


def listen(engine: Any, sources: Sequence[Any], options: DecodingOptions, spread: float, seed: int) -> list[Heard]:
    """Returns what a client of each source saw, all of them submitted within `spread` seconds."""
    drawn = random.Random(seed)
    delays = [0.0, *(drawn.uniform(0, spread) for _ in sources[1:])]

    async def everyone() -> list[Heard]:
        return await asyncio.gather(
            *(_client(engine, source, options, delay) for source, delay in zip(sources, delays, strict=True))
        )

    return asyncio.run(everyone())


def measure(
    case: Case, method: str, numbers: Sequence[int], rounds: int, *, device: torch.device, dtype: torch.dtype
) -> list[rowfile.Row]:
    """Returns a row for each number of clients. Raises RuntimeError where a stream is not the result."""
    most = max(numbers)
    generation = Generation(replace(case, batch=most), device, dtype, reference=False)
    options = replace(METHODS[method], max_length=case.tokens)
    found = []
    # as many slots as clients: the wait for another's slot is another question
    with generation.ours.engine(
        source_type="text",
        target_type="speech",
        slots=most,
        beams=options.hypotheses,
        max_length=case.tokens,
        max_source=case.source,
    ) as engine:
        engine.start()
        # buffers, threads and graphs are made
        listen(engine, generation.sources, options, 0.0, 0)
        alone = listen(engine, generation.sources[:1], options, 0.0, 0)[0].whole
        for number in numbers:
            heard: list[Heard] = []
            began = time.perf_counter()
            for seed in range(rounds):
                heard += listen(engine, generation.sources[:number], options, alone, seed)
            seconds = time.perf_counter() - began
            first = _spread([each.tokens[0] for each in heard])
            gaps = _spread([b - a for each in heard for a, b in zip(each.tokens, each.tokens[1:], strict=False)])
            row: dict[str, Any] = {
                "benchmark": "latency",
                "case": f"{case.name}, {number} clients",
                "dtype": str(dtype).removeprefix("torch."),
                "variant": method,
                "rounds": rounds,
                "requests": number,
                "first": first,
                "gap": gaps,
                "whole": _spread([each.whole for each in heard]),
                "tokens_per_second": round(sum(len(each.tokens) for each in heard) / seconds, 1),
                "shape": case.shape(),
                **environment(device),
            }
            found.append(rowfile.finished(row))
    return found


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {name: float(f"{quantile(seconds, share):.4g}") for name, share in (("p50", 0.5), ("p95", 0.95))}


HEADER = (
    "text to speech tokens",
    "method",
    "first token p50",
    "p95",
    "between tokens p50",
    "p95",
    "whole p50",
    "tokens/s",
)


def line(row: rowfile.Row) -> tuple[str, ...]:
    """Returns a row's line of the table."""
    shape = row["shape"]
    what = (
        f"{shape['dim']}×{shape['target_layers']}, {shape['tokens']} tokens, {row['requests']} clients, {row['dtype']}"
    )
    times = [row[name][key] for name in ("first", "gap") for key in ("p50", "p95")]
    seconds = [rowfile.seconds(value) for value in (*times, row["whole"]["p50"])]
    return what, row["variant"], *seconds, f"{row['tokens_per_second']:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench latency", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--set", choices=SETS, dest="kind", help="all cases of a set (cpu or gpu, by the device)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sample"], metavar="METHOD")
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="clients (1 8 32)")
    parser.add_argument("--rounds", type=int, default=3)
    add_common(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    if min(chosen.requests) < 1 or chosen.rounds < 1:
        parser.error("--requests and --rounds must be 1 or more.")
    where = resolved(chosen)
    kind = chosen.kind or ("cpu" if where.device.type == "cpu" else "gpu")
    cases = [CASES[name] for name in chosen.cases or ()] or [case for case in CASES.values() if kind in case.sets]
    asked = [(case, method) for case in cases for method in chosen.methods]
    status = 0
    for i, (case, method) in enumerate(asked[chosen.skip :], start=chosen.skip):
        if not where.left():
            print(f"{case.name}: not begun, the {chosen.limit:g} seconds are over", flush=True)
            continue
        try:
            found = measure(case, method, chosen.requests, chosen.rounds, device=where.device, dtype=where.dtype)
        except Exception as error:
            # one case must not take the others with it
            print(f"{case.name}, {method}: {type(error).__name__}: {error}", flush=True)
            status = 1
            if device_lost(where.device):
                return in_fresh_process("latency", given, i + 1, where)
            continue
        rowfile.append(where.out, found)
        print(rowfile.table(HEADER, map(line, found)), flush=True)
    return status
