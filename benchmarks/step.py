"""One decoding step of the engine: how long it takes, by its share of the roofline, and where each microsecond goes.

    python -m benchmarks step --cases "step b32-beam4" --threads 2

The whole batch is decoded twice, to a few tokens and to more; what the longer one takes more are the steps between.
Its kernels, by torch's profiler, are told apart from the encoder's in the same way; on the CPU, where the profiler's
own work is in them, they are torch's operators, and what one call does in C++ is not told apart. First the gate of
generation, for a few utterances. The roofline is `Case.step`: weights and every cache read once, at what this machine's
memory and matmuls reached just before. Beam search stands beside greedy decoding of as many rows, each an utterance of
its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import predict
from benchmarks import rows as rowfile
from benchmarks.cases import ENGINE, STEP_TOKENS, STEPS, Case, step_cases
from benchmarks.generate import check_engine, providers
from benchmarks.machine import environment, limits
from benchmarks.operations.case import SETS
from benchmarks.options import add_common, device_lost, in_fresh_process, resolved
from benchmarks.timing import interleaved, quantiles
from benchmarks.variants import Generation
from spear_fast.decoding.runner import interval

# kernels that rows name; the rest is one sum
NAMED = 24
# of a kernel's name
LONGEST_NAME = 90
# greedy decoding may take so much less for a row than beam search
AS_FAST_AS_GREEDY = 1 / 1.2


@dataclass(frozen=True)
class Kernel:
    """What one kernel, or on the CPU one of torch's operators, does in a step: launches, and seconds of all of them."""

    name: str
    calls: float
    seconds: float


def short(name: str) -> str:
    """Returns a kernel's name without what all of them have."""
    for part in ("void ", "at::native::", "(anonymous namespace)::", "at::cuda::"):
        name = name.replace(part, "")
    return name[:LONGEST_NAME]


def profiled(run: Callable[[], Any], device: torch.device) -> dict[str, tuple[int, float]]:
    """Returns name → launches and seconds of all that a call runs on the device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    found: dict[str, tuple[int, float]] = {}
    for entry in profiler.key_averages():
        if (entry.device_type == DeviceType.CUDA) != on_gpu:
            continue
        micros = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        calls, seconds = found.get(short(entry.key), (0, 0.0))
        found[short(entry.key)] = calls + entry.count, seconds + micros / 1e6
    return found


def between(
    shorter: Mapping[str, tuple[int, float]], longer: Mapping[str, tuple[int, float]], steps: int
) -> list[Kernel]:
    """Returns what a step runs, the slowest first: the difference of two runs of which one makes `steps` more."""
    kernels = []
    for name, (calls, seconds) in longer.items():
        before = shorter.get(name, (0, 0.0))
        if calls > before[0]:
            kernels.append(Kernel(name, (calls - before[0]) / steps, max(0.0, seconds - before[1]) / steps))
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def tokens_of(case: Case) -> tuple[int, int]:
    """Returns to how many tokens the shorter and the longer run decode."""
    fewest = max(1, case.tokens * STEP_TOKENS[0] // STEP_TOKENS[1])
    return fewest, case.tokens


def made(device: torch.device, tokens: int) -> int:
    """Returns the steps that the engine makes for so many tokens: it looks who is done at intervals only."""
    count = 0
    while count < tokens:
        count += interval(device, count)
    return count


def measure(case: Case, rounds: int, *, device: torch.device, dtype: torch.dtype, quick: bool = False) -> rowfile.Row:
    """Returns a row of a case's step, with its kernels."""
    check_engine(case, device)
    decode = Generation(case, device, dtype, reference=False).by_engine()
    fewest, most = tokens_of(case)
    runs = {"shorter": lambda: decode(fewest), "longer": lambda: decode(most)}
    for run in runs.values():
        run()
    machine = limits(device, dtype, quick=quick)
    seconds = interleaved(runs, rounds)
    first, last = made(device, fewest), made(device, most)
    steps = last - first
    spread = quantiles([(b - a) / steps for a, b in zip(seconds["shorter"], seconds["longer"], strict=True)])
    if spread["p50"] <= 0:
        raise RuntimeError(
            f"{steps} further steps took no time; the machine does too much else, or the case is too small."
        )
    try:
        # the first profile of a process also counts what the profiler itself makes ready
        profiled(runs["shorter"], device)
        kernels = between(profiled(runs["shorter"], device), profiled(runs["longer"], device), steps)
    except RuntimeError as error:
        # where a machine does not let the profiler look, the time is still worth having
        print(f"{case.name}: no kernels: {error}", flush=True)
        kernels = []
    # the middle one of the steps; what they read grows evenly
    generated = (first + last - 1) // 2
    work = case.step(generated, torch.finfo(dtype).bits // 8)
    floor = work.floor(machine["gbs"], machine["gflops"])
    busy = sum(kernel.seconds for kernel in kernels)
    others = sum(kernel.seconds for kernel in kernels[NAMED:])
    row: dict[str, Any] = {
        "benchmark": "step",
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "variant": ENGINE,
        "rounds": rounds,
        **{key: float(f"{value:.4g}") for key, value in spread.items()},
        "generated": generated,
        "steps": steps,
        "per_row": float(f"{spread['p50'] / (case.batch * case.beam):.4g}"),
        "floor": float(f"{floor:.4g}"),
        "bound": work.bound(machine["gbs"], machine["gflops"]),
        "percent_of_roofline": round(100 * floor / spread["p50"], 1),
        "bytes": {name: getattr(work, name) for name in ("weights", "own", "cross", "selection")},
        "flops": work.flops,
        "kernels": [
            {"name": each.name, "calls": round(each.calls, 2), "us": round(1e6 * each.seconds, 2)}
            for each in kernels[:NAMED]
        ],
        "others_us": round(1e6 * others, 2),
        "busy_us": round(1e6 * busy, 2),
        "limit": {key: round(value, 1) for key, value in machine.items()},
        "providers": providers(device, dtype, case.head_dim),
        "shape": case.shape(),
        **environment(device),
    }
    if device.type == "cuda":
        own = predict.Device(row["device"], machine["gbs"], machine["gflops"])
        foreseen = predict.seconds(predict.predicted(case, generated, torch.finfo(dtype).bits // 8), own)
        row["predicted"] = float(f"{foreseen:.4g}")
    percent = STEPS.get((case.batch, case.beam))
    if percent is not None:
        row |= {"wanted": {"percent": percent}, "reached": row["percent_of_roofline"] >= percent}
    return rowfile.finished(row)


def beside_greedy(row: rowfile.Row, earlier: Sequence[rowfile.Row]) -> rowfile.Row:
    """Returns the row with how fast it is beside greedy decoding of as many rows, where that is measured already."""
    shape = row["shape"]
    same = ("dim", "target_layers", "source")
    for other in earlier:
        theirs = other["shape"]
        equal = theirs["beam"] == 1 and theirs["batch"] == shape["batch"] * shape["beam"]
        if shape["beam"] > 1 and equal and all(theirs[name] == shape[name] for name in same):
            times = round(other["per_row"] / row["per_row"], 3)
            wanted = {**row.get("wanted", {}), "times_greedy": round(AS_FAST_AS_GREEDY, 3)}
            reached = row.get("reached", True) and times >= wanted["times_greedy"]
            return {**row, "times_greedy": times, "wanted": wanted, "reached": reached}
    return row


def report(row: rowfile.Row) -> str:
    """Returns a row in words and its kernels as a Markdown table."""
    said = f"{row['case']}, {row['dtype']}, after {row['generated']} tokens: {rowfile.seconds(row['p50'])} a step, "
    said += f"{row['percent_of_roofline']:.0f} % of the roofline's {rowfile.seconds(row['floor'])} ({row['bound']})"
    if "predicted" in row:
        said += f", predicted {rowfile.seconds(row['predicted'])}"
    if "times_greedy" in row:
        said += f", {row['times_greedy']:.2f} times as fast as greedy decoding for each row"
    if "wanted" in row:
        wanted = ", ".join(f"{name} {value:g}" for name, value in row["wanted"].items())
        said += f"; {'reached' if row['reached'] else 'MISSED'}: {wanted}"
    step = 1e6 * row["p50"]

    def share(micros: float) -> str:
        return f"{100 * micros / step:.0f} %"

    lines = [(each["name"], f"{each['calls']:g}", f"{each['us']:.1f}", share(each["us"])) for each in row["kernels"]]
    lines.append(("others", "", f"{row['others_us']:.1f}", share(row["others_us"])))
    idle = max(0.0, step - row["busy_us"])
    lines.append(("between them", "", f"{idle:.1f}", share(idle)))
    return f"{said}\n\n{rowfile.table(('kernel', 'launches', 'µs', 'of the step'), lines)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    cases = {case.name: case for case in step_cases()}
    parser = argparse.ArgumentParser(prog="spear-fast bench step", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--set", choices=SETS, dest="kind", help="all cases of a set (cpu or gpu, by the device)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--predict", action="store_true", help="measure nothing: print what a step should take on an H100, by a model"
    )
    parser.add_argument(
        "--kv-dtype", choices=("exact", "fp8"), default="exact", help="of the source's keys and values, with --predict"
    )
    add_common(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    if chosen.predict:
        asked = [cases[name] for name in chosen.cases or ()] or [each for each in cases.values() if "gpu" in each.sets]
        for case in asked:
            print(predict.report(case, sum(tokens_of(case)) // 2, kv_dtype=chosen.kv_dtype), flush=True)
        return 0
    where = resolved(chosen)
    kind = chosen.kind or ("cpu" if where.device.type == "cpu" else "gpu")
    named = [cases[name] for name in chosen.cases or ()] or [case for case in cases.values() if kind in case.sets]
    found: list[rowfile.Row] = []
    status = 0
    for i, case in enumerate(named[chosen.skip :], start=chosen.skip):
        if not where.left():
            print(f"{case.name}: not begun, the {chosen.limit:g} seconds are over", flush=True)
            continue
        try:
            quick = "tiny" in case.sets
            row = measure(case, chosen.rounds, device=where.device, dtype=where.dtype, quick=quick)
        except Exception as error:
            # one case must not take the others with it
            print(f"{case.name}: {type(error).__name__}: {error}", flush=True)
            status = 1
            if device_lost(where.device):
                return in_fresh_process("step", given, i + 1, where)
            continue
        found.append(beside_greedy(row, found))
        rowfile.append(where.out, found[-1:])
        print(report(found[-1]), flush=True)
    return status
