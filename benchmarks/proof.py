"""The first minutes on a GPU: whether all is right there, and what a step takes; `make gpu-proof`.

    python -m benchmarks.proof --out DIR --budget 240

One process, a JSON line for each item as soon as it is known, in DIR/proof.ndjson: the versions; every op at its real
shapes, each provider against float64 by the tests' rule; the step's time at real sizes by replaying a graph at fixed
lengths, its kernels and the prediction beside it; graphs and eager steps, the same tokens; an utterance whatever is
decoded beside it, the same bits; the memory that CUDA kernels touch. What fails is written with its seed, shape and
traceback, and the next item begins, in a fresh process where the device no longer answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import kit, predict
from benchmarks.cases import CASES, STEP_TOKENS, Case, step_cases
from benchmarks.checked import Gate, computed
from benchmarks.gpu import MEMCHECKED, UNCACHED, memcheck, python
from benchmarks.machine import CPU, REPOSITORY, environment
from benchmarks.op import spread
from benchmarks.operations import OpCase, chosen_cases
from benchmarks.options import device_lost
from benchmarks.step import profiled
from benchmarks.triton_cache import cubins
from benchmarks.variants import Generation
from spear_fast import DecodingOptions
from spear_fast.decoding.methods import Mix, step
from spear_fast.decoding.state import DecodeState
from spear_fast.ops import providers

BUDGET = 240.0
# of a graph, for one time; of the profile
REPLAYS, PROFILED = 200, 10
# seed of every item's inputs, which the cases set themselves
SEED = 0
# kernels named of a step
NAMED = 16
# utterances whose sources are projected at the same time
ADMITTED = 8
MEMCHECK_SECONDS = 60


class Item(NamedTuple):
    """What is looked at. check: returns what is to be written; raises where something is wrong."""

    name: str
    check: Callable[[], dict[str, Any]]


class Proof:
    """The items for a device. dry: at tiny sizes."""

    def __init__(self, device: torch.device, *, dry: bool) -> None:
        self.device, self.dry = device, dry
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def items(self) -> Iterator[Item]:
        """Yields all items, the most telling first."""
        yield Item("versions", self.versions)
        steps = {case.name: case for case in step_cases()}
        chosen = [case for case in steps.values() if ("tiny" if self.dry else "gpu") in case.sets and case.beam > 1]
        chosen += [case for case in steps.values() if not self.dry and case.name.endswith(" 1x1")]
        cases = spread(chosen_cases("tiny" if self.dry else "gpu", extra=False))
        for case in cases:
            yield from self._op(case, case.dtype or self.dtype)
        for case in sorted(chosen, key=lambda each: -each.batch * each.beam):
            yield Item(f"step {case.name.removeprefix('step ')}", partial(self.step, case))
        small, large = (CASES["tiny"],) * 2 if self.dry else (CASES["512x6 32x4"], CASES["1024x12 32x4"])
        yield Item("steps as graphs and without", partial(self.graph_and_eager, small))
        yield Item("whatever is beside", partial(self.whatever_is_beside, large))
        yield Item("triton cache", self.triton_cache)
        if self.device.type == "cuda":
            yield Item("memcheck", self.memcheck)
            for case in cases:
                if case.dtype is None:
                    yield from self._op(case, torch.float16)

    def versions(self) -> dict[str, Any]:
        from spear_fast.ops import extension

        found: dict[str, Any] = {**environment(self.device), "python": sys.version.split()[0]}
        found["extension"] = extension.missing() or extension.facts()
        found["kit"] = kit.outdated()
        found["refused"] = [f"{row.op} {row.provider}: {row.missing}" for row in providers.available() if row.missing]
        return found

    def triton_cache(self) -> dict[str, Any]:
        """Says how many kernels of Triton had to be compiled since the process began."""
        now = cubins() if "TRITON_CACHE_DIR" in os.environ else None
        return {"kernels": now, "at_first": _AT_FIRST}

    def _op(self, case: OpCase, dtype: torch.dtype) -> Iterator[Item]:
        for name in providers.names(case.op):
            devices = providers.get(case.op, name).devices
            if name != "reference" and (devices is None or self.device.type in devices):
                title = f"op {case.title} {case.mode} {name} {str(dtype).removeprefix('torch.')}"
                yield Item(title, partial(self.op, case, name, dtype))

    def op(self, case: OpCase, name: str, dtype: torch.dtype) -> dict[str, Any]:
        """Holds a provider's results against float64; says why it cannot run where it cannot."""
        arguments = case.inputs(dtype, self.device)
        query = providers.ProviderQuery(self.device, dtype, arguments[0].shape[-1], case.options(arguments))
        refused = providers.get(case.op, name).refusal(query)
        shape = {"shape": dict(case.shape)}
        if refused is not None:
            return {**shape, "refused": refused}
        return {**shape, **Gate.of(case, arguments).error(computed(case, name, arguments))}

    def memcheck(self) -> dict[str, Any]:
        """Runs the CUDA kernels' tests in a process of their own under compute-sanitizer; raises with what it says."""
        command = [*memcheck(), *python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"), *MEMCHECKED]
        environment = {**os.environ, **UNCACHED}
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=MEMCHECK_SECONDS,
        )
        said = done.stdout.splitlines()[-12:]
        if done.returncode:
            raise AssertionError("\n".join(said))
        return {"said": said[-1]}

    @torch.inference_mode()
    def step(self, case: Case) -> dict[str, Any]:
        """Times a step after a fixed number of tokens, the selection included; as a graph where there are any."""
        decoder = Generation(replace(case, batch=1), self.device, self.dtype, reference=False).ours.decoder("text")
        generated = sum(STEP_TOKENS) // 2 if not self.dry else case.tokens // 2
        state = DecodeState.allocate(
            decoder, slots=case.batch, beams=case.beam, positions=generated + 2, max_source=case.source, guided=False
        )
        options = DecodingOptions(beam_size=case.beam, max_length=generated + 1)
        if case.beam == 1:
            options = DecodingOptions(method="greedy", max_length=generated + 1)
        torch.manual_seed(SEED)
        for first in range(0, case.batch, ADMITTED):
            slots = list(range(first, min(first + ADMITTED, case.batch)))
            memories = [torch.randn(case.source, decoder.dim, device=self.device, dtype=self.dtype) for _ in slots]
            state.fill(slots, memories, [options] * len(slots), [0] * len(slots), decoder)
        for cache in (*state.keys, *state.values):
            cache.normal_()
        # half of a history is common to the beams, the other half each has its own
        state.ancestors[:, :, generated // 2 :] = torch.arange(case.beam, device=self.device, dtype=torch.uint8)[
            :, None
        ]
        if state.capacity < generated + 2:
            state.grow(generated + 2)
        mix = Mix.of([(slot, options) for slot in range(case.batch)])

        def again() -> None:
            state.lengths.fill_(generated)
            state.done.fill_(False)
            step(decoder, state, mix)

        again()
        run = self._captured(again)
        count = 2 if self.dry else REPLAYS
        run()
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            run()
        self._wait()
        seconds = (time.perf_counter() - began) / count
        size = torch.finfo(self.dtype).bits // 8
        foreseen = predict.seconds(predict.predicted(case, generated, size))
        floor = case.step(generated, size).floor(predict.H100.gbs, predict.H100.gflops)
        profile = profiled(lambda: [run() for _ in range(PROFILED)], self.device)
        kernels = sorted(profile.items(), key=lambda entry: -entry[1][1])
        scores_are_finite = bool(torch.isfinite(state.scores).all())
        return {
            "us": round(1e6 * seconds, 2),
            "predicted_us": round(1e6 * foreseen, 2),
            "floor_us": round(1e6 * floor, 2),
            "percent_of_roofline": round(100 * floor / seconds, 1),
            "generated": generated,
            "finite": scores_are_finite,
            "launches": round(sum(calls for calls, _ in profile.values()) / PROFILED, 1),
            "kernels": [
                {"name": name, "calls": calls / PROFILED, "us": round(1e6 * spent / PROFILED, 2)}
                for name, (calls, spent) in kernels[:NAMED]
            ],
        }

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.device.type != "cuda":
            return run
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def graph_and_eager(self, case: Case) -> dict[str, Any]:
        """Decodes a batch with steps as graphs and without; raises where a token differs."""
        generation = Generation(case, self.device, self.dtype, reference=False)
        found = []
        for graphs in ("1", "0"):
            before = os.environ.get("SPEAR_FAST_GRAPHS")
            os.environ["SPEAR_FAST_GRAPHS"] = graphs
            try:
                found.append(generation.by_engine()(min(case.tokens, 40)))
            finally:
                if before is None:
                    del os.environ["SPEAR_FAST_GRAPHS"]
                else:
                    os.environ["SPEAR_FAST_GRAPHS"] = before
        equal = [bool(torch.equal(a, b)) for a, b in zip(*found, strict=True)]
        if not all(equal):
            raise AssertionError(f"{equal.count(False)} of {len(equal)} utterances have other tokens by graphs.")
        return {"utterances": len(equal)}

    def whatever_is_beside(self, case: Case) -> dict[str, Any]:
        """Decodes utterances in both orders with deterministic=True; raises where a token or a score differs."""
        generation = Generation(case, self.device, self.dtype, reference=False)
        options = DecodingOptions(beam_size=case.beam, max_length=min(case.tokens, 24))
        found = []
        sources = generation.sources
        with generation.ours.engine(
            slots=max(1, case.batch // 2),
            beams=case.beam,
            max_length=options.max_length,
            max_source=case.source,
            deterministic=True,
        ) as engine:
            for order in (1, -1):
                requests = [engine.submit(source, options) for source in sources[::order]]
                found.append([request.result() for request in requests][::order])
        differing = [
            i
            for i, (a, b) in enumerate(zip(*found, strict=True))
            if not (torch.equal(a.tokens, b.tokens) and torch.equal(a.scores, b.scores))
        ]
        if differing:
            raise AssertionError(f"utterances {differing[:8]} of {len(sources)} differ by what is decoded beside them.")
        return {"utterances": len(sources)}


# kernels in Triton's cache when the process began
_AT_FIRST = cubins() if "TRITON_CACHE_DIR" in os.environ else None


def prove(items: Iterator[Item], out: Path, *, device: torch.device, skip: int, until: float) -> int | None:
    """Writes what each item shows; returns how many failed, or None where the device is lost, having said after which.

    skip: items that are done already. until: of `time.monotonic`, after which none is begun.
    """
    failed = 0
    with out.open("a") as file:
        for i, item in enumerate(items):
            if i < skip:
                continue
            if time.monotonic() > until:
                print(f"{item.name}: not begun, the time is over", flush=True)
                _write(file, {"item": item.name, "ok": None, "reason": "not begun"})
                continue
            began = time.perf_counter()
            record: dict[str, Any] = {"item": item.name, "number": i}
            try:
                record |= {"ok": True, **item.check()}
            except Exception as error:
                failed += 1
                said = traceback.format_exc(limit=-6)
                record |= {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": said, "seed": SEED}
            record["seconds"] = round(time.perf_counter() - began, 2)
            _write(file, record)
            print(line(record), flush=True)
            # what an item held is the next one's
            gc.collect()
            if device.type == "cuda" and record["ok"]:
                torch.cuda.empty_cache()
            if not record["ok"] and device_lost(device):
                _write(file, {"item": "device lost", "number": i, "ok": False})
                return None
    return failed


def _write(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, default=str) + "\n")
    file.flush()


def line(record: dict[str, Any]) -> str:
    """Returns a record in a line."""
    said = "ok" if record["ok"] else f"WRONG: {str(record.get('error')).splitlines()[0][:300]}"
    if record.get("refused"):
        said = f"not here: {record['refused']}"
    if record.get("kit"):
        said += f", but {record['kit']}"
    if "us" in record:
        said += (
            f", {record['us']:.1f} µs, predicted {record['predicted_us']:.1f}, {record['percent_of_roofline']:.0f} %"
        )
    return f"{record['item']}: {said} ({record['seconds']:.1f} s)"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of proof.ndjson")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help=f"seconds after which nothing is begun ({BUDGET:g})"
    )
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N items")
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, at tiny sizes")
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("gpu-proof: there is no CUDA device here; try the machinery with --dry-run.", file=sys.stderr)
        return 2
    began = time.monotonic()
    device = CPU if chosen.dry_run else torch.device("cuda")
    chosen.out.mkdir(parents=True, exist_ok=True)
    out = chosen.out / "proof.ndjson"
    proof = Proof(device, dry=chosen.dry_run)
    failed = prove(proof.items(), out, device=device, skip=chosen.skip, until=began + chosen.budget)
    if failed is not None:
        return int(failed > 0)
    last = [json.loads(each) for each in out.read_text().splitlines()][-1]["number"]
    left = chosen.budget - (time.monotonic() - began)
    print(f"the device no longer answers: a fresh process continues after item {last}", flush=True)
    command = [sys.executable, "-u", "-m", "benchmarks.proof", "--out", str(chosen.out), "--skip", str(last + 1)]
    subprocess.run([*command, "--budget", f"{left:.0f}"], cwd=REPOSITORY, check=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
