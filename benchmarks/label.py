"""The whole job of labelling clips of 20 s: 1,000 source ids, 300 output tokens, 5 beams; by this package and by peers.

    python -m benchmarks label --peers

A rate is in times real time, and in GPU-hours for 60,000 hours of speech. What is timed is the labeller of `spear-fast
label`, with encoding and without files. The roofline is that of the decoding steps alone. Peers take long, so that they
decode a few tokens only, to two lengths, and the rest is extrapolated from the steps between these: steps get slower as
texts grow, which favours them. Each runs at the reference's batch of 4, and at the largest that fits, where memory too
is taken to grow like between the two.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import rows as rowfile
from benchmarks import t5
from benchmarks.cases import CASES, ENGINE, REFERENCE, REPAIRED, TRANSFORMERS_STATIC, Case, labelling
from benchmarks.extrapolate import Decode, Extrapolated, extrapolated, that_fit
from benchmarks.generate import check_engine
from benchmarks.machine import commit, device_name, environment, limits, version
from benchmarks.operations.case import SETS
from benchmarks.options import Where, add_common, device_lost, in_fresh_process, resolved
from benchmarks.peers import reference
from benchmarks.timing import interleaved, quantiles
from benchmarks.variants import DISTRIBUTIONS, Generation
from spear_fast.labelling.labeller import Label, Labeller
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.prepare import Utterance
from spear_fast.labelling.shards import SLOT_TOKENS

CLIP_SECONDS = 20.0
HOURS = 60_000
# the rate to reach, in times real time, and how many times the reference's
REAL_TIME, TIMES_REFERENCE = {"label 1024x12": 1500.0}, 200.0
# of these the largest that fits is measured; the first is the reference's own
BATCHES = (4, 16, 64, 256, 1024)
# tokens that a peer decodes
PEERS = {REFERENCE: 16, REPAIRED: 16, TRANSFORMERS_STATIC: 32}


def cases(kind: str) -> list[Case]:
    """Returns the jobs of a set, the more telling one first."""
    if kind == "tiny":
        return [replace(CASES["tiny"], name="label tiny", batch=6, beam=2, tokens=12, slots=6)]
    return [labelling(name) for name in ("1024x12", "512x6")]


def real_time(case: Case, clips: int, seconds: float) -> dict[str, float]:
    """Returns the rate of labelling so many clips in so many seconds; a clip lasts by its source ids."""
    times = clips * CLIP_SECONDS * (case.source / 1000) / seconds
    return {"times_real_time": float(f"{times:.4g}"), "hours_for_60000": float(f"{HOURS / times:.4g}")}


def labelled(generation: Generation) -> Callable[[], list[Label | Exception]]:
    """Returns what labels the clips by `spear-fast label`'s labeller, which is made once, with the case's slots."""
    case, dtype = generation.case, str(generation.dtype).removeprefix("torch.")
    options = LabelOptions(
        beam_size=case.beam, max_length=case.tokens, max_source_tokens=case.source, dtype=dtype,  # type: ignore[arg-type]
        batch_tokens=SLOT_TOKENS * case.slots, device=str(generation.device),
    )  # fmt: skip
    labeller = Labeller(generation.ours, options, case.batch)
    utterances = [
        Utterance(i, str(i), source.cpu().numpy(), CLIP_SECONDS) for i, source in enumerate(generation.sources)
    ]

    def decode() -> list[Label | Exception]:
        for utterance in utterances:
            labeller.submit(utterance, utterance)
        done: list[tuple[Utterance, Any]] = []
        while labeller.busy:
            done += labeller.step()
        return labeller.labels(done)

    return decode


def ours(case: Case, rounds: int, *, device: torch.device, dtype: torch.dtype, quick: bool) -> rowfile.Row:
    """Returns this package's row of a job."""
    check_engine(case, device)
    decode = labelled(Generation(case, device, dtype, reference=False))
    # steps are captured and buffers grow in the first run; a job of ten thousands of hours hardly has any of it
    decode()
    machine = limits(device, dtype, quick=quick)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spread = quantiles(interleaved({ENGINE: decode}, rounds)[ENGINE])
    floor = case.steps_floor(machine["gbs"], machine["gflops"], torch.finfo(dtype).bits // 8)
    row = _row(case, ENGINE, case.batch, spread, device=device, dtype=dtype)
    row |= {
        "rounds": rounds,
        "floor": float(f"{floor:.4g}"),
        "percent_of_roofline": round(100 * floor / spread["p50"], 1),
        "limit": {key: round(value, 1) for key, value in machine.items()},
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "versions": {},
    }
    wanted = REAL_TIME.get(case.name)
    if wanted is not None:
        row |= {"wanted": {"times_real_time": wanted}, "reached": row["times_real_time"] >= wanted}
    return rowfile.finished(row)


def _row(
    case: Case, variant: str, batch: int, spread: dict[str, float], *, device: torch.device, dtype: torch.dtype
) -> rowfile.Row:
    return {
        "benchmark": "label",
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "variant": variant,
        "batch": batch,
        **{key: float(f"{value:.4g}") for key, value in spread.items()},
        **real_time(case, batch, spread["p50"]),
        "tokens_per_second": round(batch * case.tokens / spread["p50"], 2),
        "measured_tokens": case.tokens,
        "shape": case.shape(),
        **environment(device),
    }


def peer(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Decode:
    """Returns what decodes the job's clips by a peer.

    Raises RuntimeError or ImportError where it is not installed.
    """
    ids = torch.randint(case.vocabulary, (max(BATCHES), case.source), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    if name == TRANSFORMERS_STATIC:
        model = t5.t5(case, device).to(dtype)
        return lambda batch, tokens: t5.by_transformers(case, model, ids[:batch] + t5.SPECIAL, device, static=True)(
            tokens
        )
    model = reference(case, device, flash=name == REPAIRED).to(dtype)
    options: dict[str, Any] = dict(source_type="speech", target_type="text", beam_search_decode=True)

    @torch.inference_mode()
    def decode(batch: int, tokens: int) -> Any:
        return model.generate(ids[:batch], max_length=tokens, beam_size=case.beam, **options)

    return decode


def peers(
    case: Case, rate: float, *, device: torch.device, dtype: torch.dtype, left: Callable[[], bool]
) -> Iterator[rowfile.Row | str]:
    """Yields rows of the peers, at the first batch and at the largest that fits, or why one has none.

    rate: the engine's, in times real time. left: whether there is time for another batch.
    """
    memory = float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0.0
    batches = BATCHES if device.type == "cuda" else BATCHES[:2]
    for name, tokens in PEERS.items():
        tokens = min(tokens, case.tokens)
        try:
            decode = peer(name, case, device, dtype)
            # what is loaded and compiled once is in no time
            decode(batches[0], 2)
        except (ImportError, RuntimeError, ValueError) as error:
            yield f"{case.name}: {name}: {str(error).splitlines()[0]}"
            continue
        measured: list[Extrapolated] = []
        measure = functools.partial(_measured, decode, tokens, device)
        for found in that_fit(measure, case.tokens, memory, batches):
            measured.append(found)
            if not left():
                break
        del decode, measure
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not measured:
            yield f"{case.name}: {name}: not even {batches[0]} clips fit"
        modes = {f"batch {batches[0]}": measured[:1], "largest batch": measured[1:][-1:]}
        for mode, chosen in modes.items():
            for found in chosen:
                yield _of_peer(case, name, mode, found, rate, device=device, dtype=dtype)


def _measured(decode: Decode, tokens: int, device: torch.device, batch: int) -> Extrapolated:
    return extrapolated(decode, batch, tokens, device)


def _of_peer(
    case: Case, name: str, mode: str, found: Extrapolated, rate: float, *, device: torch.device, dtype: torch.dtype
) -> rowfile.Row:
    seconds, held = found.at(case.tokens)
    row = _row(case, name, found.batch, quantiles([seconds]), device=device, dtype=dtype)
    ours_by_theirs = round(rate / row["times_real_time"], 2)
    row |= {
        "mode": mode,
        "measured_tokens": found.tokens,
        "measured_seconds": [float(f"{each:.4g}") for each in found.seconds],
        "peak_bytes": held or None,
        "engine_times": ours_by_theirs,
        "versions": {DISTRIBUTIONS[REFERENCE if name == REPAIRED else name]: None},
    }
    row["versions"] = {each: version(each) for each in row["versions"]}
    if name == REFERENCE and case.name in REAL_TIME:
        row |= {"wanted": {"engine_times": TIMES_REFERENCE}, "reached": ours_by_theirs >= TIMES_REFERENCE}
    return rowfile.finished(row)


def measured_before(case: Case, where: Where) -> rowfile.Row | None:
    """Returns the engine's row of a job, of this commit and device, where the file of rows has it."""
    if where.out is None or not where.out.is_file():
        return None
    wanted = {"benchmark": "label", "case": case.name, "variant": ENGINE, "device": device_name(where.device)}
    wanted |= {"dtype": str(where.dtype).removeprefix("torch."), "commit": commit()}
    found = [row for row in rowfile.read(where.out) if all(row.get(name) == value for name, value in wanted.items())]
    return found[-1] if found else None


def table(rows: Sequence[rowfile.Row]) -> str:
    """Returns the rows as a Markdown table."""
    header = (
        "job",
        "by",
        "batch",
        "time",
        "× real time",
        "GPU-hours for 60,000 h",
        "of the roofline",
        "engine's ×",
        "",
    )
    return rowfile.table(header, map(line, rows))


def line(row: rowfile.Row) -> list[str]:
    """Returns the cells of a row."""
    wanted = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row.get("wanted", {}).items())
    few = "" if row["measured_tokens"] == row["shape"]["tokens"] else f", from {row['measured_tokens']} tokens"
    return [
        f"{row['case'].removeprefix('label ')}, {row['dtype']}",
        row["variant"],
        str(row["batch"]),
        rowfile.seconds(row["p50"]) + few,
        f"{row['times_real_time']:.4g}",
        f"{row['hours_for_60000']:.4g}",
        f"{row['percent_of_roofline']:.0f} %" if "percent_of_roofline" in row else "",
        f"{row['engine_times']:.4g}" if "engine_times" in row else "",
        f"{wanted}: {'reached' if row['reached'] else '**missed**'}" if wanted else "",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench label", description=__doc__.partition("\n")[0])
    parser.add_argument("--set", choices=SETS, dest="kind", help="gpu, or tiny on the CPU")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="jobs whose name holds one of these words")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="the reference, as it is and repaired, and transformers")
    parser.add_argument("--peers-only", action="store_true", help="peers, beside the engine's row that is there")
    add_common(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    where = resolved(chosen)
    kind = chosen.kind or ("tiny" if where.device.type == "cpu" else "gpu")
    status = 0
    named = [case for case in cases(kind) if not chosen.cases or any(word in case.name for word in chosen.cases)]
    for i, case in enumerate(named[chosen.skip :], start=chosen.skip):
        if not where.left():
            print(f"{case.name}: not begun, the {chosen.limit:g} seconds are over", flush=True)
            continue
        try:
            own = measured_before(case, where) if chosen.peers_only else None
            if own is None:
                own = ours(case, chosen.rounds, device=where.device, dtype=where.dtype, quick=kind == "tiny")
                rowfile.append(where.out, [own])
        except Exception as error:
            # one job must not take the other with it
            print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
            status = 1
            if device_lost(where.device):
                return in_fresh_process("label", given, i + 1, where)
            continue
        print(table([own]), flush=True)
        options: dict[str, Any] = dict(device=where.device, dtype=where.dtype, left=where.left)
        for row in peers(case, own["times_real_time"], **options) if chosen.peers or chosen.peers_only else ():
            if isinstance(row, str):
                print(f"not timed: {row}", flush=True)
                continue
            rowfile.append(where.out, [row])
            print("| " + " | ".join(line(row)) + " |", flush=True)
    return status
