"""Times the ops: every provider that can run here beside what plain torch does instead, by a share of the roofline.

    python -m benchmarks op --ops decode_cross_attention rms_norm --threads 2

Each provider and baseline of a case first has to give the right numbers; then all of them are timed in turn, from warm
caches (the inputs were just used) and from cold ones (so many copies of the inputs in turn that each has left them).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows as rowfile
from benchmarks.checked import Gate, call_of, computed
from benchmarks.machine import DTYPES, last_level_cache
from benchmarks.op_rows import CACHES, Candidate, Settings, rows_of, table
from benchmarks.operations import OpCase, chosen_cases
from benchmarks.operations.case import SETS, ElsewhereError, cloned
from benchmarks.options import DeviceLostError, add_skip, device_lost, in_fresh_process, resolved
from benchmarks.timing import Variant, sampled
from spear_fast.ops import providers

# copies of the inputs may take so many bytes
MOST_COPIED = {"cpu": 1 << 30, "cuda": 8 << 30}
MOST_COPIES = 256


def measured(case: OpCase, settings: Settings) -> tuple[list[rowfile.Row], list[str]]:
    """Returns a row for each candidate and cache of a case, and why others have none."""
    device, dtype = settings.device, settings.dtype
    arguments = case.inputs(dtype, device)
    gate = Gate.of(case, arguments)
    inputs = providers.ProviderQuery(device, dtype, arguments[0].shape[-1], case.options(arguments))
    automatic = chosen_by_itself(case.op, inputs)
    candidates = [*_providers(case, settings, inputs), *(_baselines(case) if settings.baselines else ())]
    candidates = [each for each in candidates if _check(case, gate, each, arguments)]
    able = [candidate for candidate in candidates if candidate.refused is None]
    del gate
    rows: list[rowfile.Row] = []
    for cache in settings.caches if able else ():
        copies = _copies(arguments, cache, device, bool(case.consumed))[: 3 if settings.quick else None]
        variants = [_variant(case, candidate, copies) for candidate in able]
        found = sampled(variants, device, settings.seconds, (2, 2) if settings.quick else (5, 100))
        clocks = {variant.name: variant.clock for variant in variants}
        rows += rows_of(case, settings, cache, able, automatic, found, clocks)
        del copies, variants
    return rows, [f"{case.title}: {each.name}: {each.refused}" for each in candidates if each.refused]


def chosen_by_itself(op: str, inputs: providers.ProviderQuery) -> str:
    """Returns the provider that computes an op for such inputs where nobody forces one."""
    with providers.forced(""):
        function = providers.choose(op, inputs)
    return next(name for name in providers.names(op) if providers.get(op, name).function is function)


def _providers(case: OpCase, settings: Settings, inputs: providers.ProviderQuery) -> Iterator[Candidate]:
    for name in providers.names(case.op):
        if settings.providers and name not in settings.providers:
            continue
        yield Candidate(name, True, refused=providers.get(case.op, name).refusal(inputs))


def _baselines(case: OpCase) -> Iterator[Candidate]:
    for name in case.baselines:
        yield Candidate(name, False)


def _check(case: OpCase, gate: Gate, candidate: Candidate, arguments: Sequence[Any]) -> bool:
    """Notes a candidate's error, or why it cannot or must not be timed; returns whether it belongs here at all."""
    if candidate.refused is not None:
        return True
    try:
        if candidate.provider:
            results: Sequence[Tensor] = computed(case, candidate.name, arguments)
        else:
            prepared = case.baselines[candidate.name](cloned(arguments))
            with prepared.within():
                results = prepared.read(prepared.run())
        candidate.error = gate.error(results)
    except ElsewhereError:
        return False
    except AssertionError as wrong:
        candidate.refused = f"wrong: {wrong}"
    except (RuntimeError, ImportError, NotImplementedError) as error:
        candidate.refused = f"not here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return True


def _copies(arguments: Sequence[Any], cache: str, device: torch.device, consumed: bool) -> list[list[Any]]:
    """Returns as many copies of the inputs as leave the caches warm, or cold."""
    size = max(1, sum(each.numel() * each.element_size() for each in arguments if isinstance(each, Tensor)))
    last = last_level_cache(device)
    if cache == "warm":
        # what is consumed takes a copy a call; together they stay in the cache
        count = max(1, min(16, last // 4 // size)) if consumed else 1
    else:
        count = min(-(-2 * last // size), MOST_COPIES, max(1, MOST_COPIED[device.type] // size))
    return [cloned(arguments) for _ in range(count)]


def _variant(case: OpCase, candidate: Candidate, copies: Sequence[Sequence[Any]]) -> Variant:
    restore = None
    if case.consumed:
        originals = [[copy[i].clone() for i in case.consumed] for copy in copies]

        def restore() -> None:
            for copy, saved in zip(copies, originals, strict=True):
                for i, value in zip(case.consumed, saved, strict=True):
                    copy[i].copy_(value)

    if candidate.provider:
        calls = [call_of(case, candidate.name, copy) for copy in copies]
        within: Any = functools.partial(providers.forced, f"{case.op}={candidate.name}")
        # the definition may look at numbers, which a graph does not allow
        graph = not case.gradients and candidate.name != "reference"
    else:
        prepared = [case.baselines[candidate.name](copy) for copy in copies]
        calls, within, graph = [each.run for each in prepared], prepared[0].within, not case.gradients
    return Variant(candidate.name, calls, restore, within, graph)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose cases and settings, which `compare` has too."""
    parser.add_argument("--ops", nargs="+", metavar="OP", help="these ops alone")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="cases whose title holds all of these words")
    parser.add_argument("--set", choices=SETS, dest="kind", help="which shapes (cpu or gpu, by the device)")
    parser.add_argument("--providers", nargs="+", default=(), metavar="NAME", help="these providers alone")
    parser.add_argument("--without-baselines", action="store_true")
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument("--no-extra", action="store_true", help="leave out the shapes of second rank")
    rank.add_argument("--only-extra", action="store_true", help="the shapes of second rank alone")
    add_skip(parser)
    parser.add_argument("--spread", action="store_true", help="a case of each op in turn, for when time is short")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case and cache (2)")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which no further case is begun")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on the CPU")


def spread(cases: Sequence[OpCase]) -> list[OpCase]:
    """Returns the cases such that every op comes once before any comes again."""
    turn: Counter[str] = Counter()
    turns = []
    for case in cases:
        turns.append(turn[case.op])
        turn[case.op] += 1
    return [case for _, case in sorted(zip(turns, cases, strict=True), key=lambda entry: entry[0])]


def run(chosen: argparse.Namespace, out: Path | None) -> list[rowfile.Row]:
    """Measures what the options choose; prints a table for each case; appends its rows to `out` at once.

    Raises DeviceLostError where a kernel leaves the device in a state in which nothing further can be measured.
    """
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    dtypes = chosen.dtypes or ["float32" if device.type == "cpu" else "bfloat16"]
    kind = chosen.kind or {"cpu": "cpu"}.get(device.type, "gpu")
    cases = chosen_cases(kind, chosen.ops, chosen.cases, extra=not chosen.no_extra)
    cases = [case for case in cases if case.extra or not chosen.only_extra]
    if chosen.spread:
        cases = spread(cases)
    if not cases:
        raise ValueError(f"no case of the set {kind} has these ops and words; choose others with --ops and --cases.")
    unknown = {case.op for case in cases} - set(providers.ops())
    if unknown:
        print(f"not ops of this version: {', '.join(sorted(unknown))}\n")
        cases = [case for case in cases if case.op not in unknown]
    began, everything = time.perf_counter(), []
    for i, case in enumerate(cases[chosen.skip :], start=chosen.skip):
        for dtype in dtypes[:1] if case.dtype else dtypes:
            if chosen.limit is not None and time.perf_counter() - began > chosen.limit:
                print(f"{case.title}: not begun, the {chosen.limit:g} seconds are over", flush=True)
                continue
            settings = Settings(
                device,
                case.dtype or DTYPES[dtype],
                chosen.caches,
                chosen.seconds,
                chosen.providers,
                not chosen.without_baselines,
                quick=kind == "tiny",
            )
            try:
                rows, reasons = measured(case, settings)
            except Exception as error:
                # one case must not take the others with it
                rows, reasons = [], [f"{case.title}: {type(error).__name__}: {error}"]
            rowfile.append(out, rows)
            everything += rows
            shown = [table(rows), ""] if rows else []
            print("\n".join([*(f"not timed: {reason}" for reason in reasons), *shown]), flush=True)
            if device_lost(device):
                raise DeviceLostError(i + 1)
    return everything


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench op", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file, or to the device's in a folder")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the rows as PNG files")
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    chosen.dtype = None
    where = resolved(chosen)
    try:
        rows = run(chosen, where.out)
    except DeviceLostError as lost:
        return in_fresh_process("op", given, lost.done, where)
    if chosen.plots is not None:
        from benchmarks.plots import draw

        draw(rows, chosen.plots)
    return 0
