"""A planned job on a Ray cluster: actors label shards as a desk gives them; this process watches, reports and resumes.

Only the extra `ray` brings Ray; nothing but `spear_fast.ray` and `label --ray` imports this file.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spear_fast.labelling.errors import Interrupted, LabellingError, reason_of
from spear_fast.labelling.files import FolderLock
from spear_fast.labelling.job import announce, pending_shards, progress, summarize
from spear_fast.labelling.parts import part_store
from spear_fast.labelling.planning import JobPlan, read_plan
from spear_fast.labelling.progress import Reporter, Silent, Summary
from spear_fast.labelling.sharing import Dispatcher, Tally

POLL_SECONDS = 0.25
# deaths of each actor, on average, without any shard being written, after which the job gives up
MOST_DEATHS = 10
# after which it is said that no actor could be started
PATIENCE_SECONDS = 60.0


def label_on_ray(
    out: str | Path,
    model: str | None = None,
    *,
    address: str | None = None,
    actors: int | None = None,
    gpus: float | None = None,
    cpus: float = 1,
    report: Reporter | None = None,
    stop: threading.Event | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    relabel_changed: bool = False,
    lock: bool = True,
) -> Summary:
    """Labels what was planned in `out` with actors on a Ray cluster, which see the same folders as this process.

    model: where it is, by default where the plan says. address: of the cluster; without one it is what this process
    is connected to, else what RAY_ADDRESS says, else this machine. actors: how many, by default as many as the cluster
    has room for. gpus: of each, by default one where the plan is for GPUs; a half puts two on one. cpus: of each, and
    threads of torch where the plan is for CPUs. An actor that dies, or whose node does, is replaced wherever there is
    room; the others do its shards, from where it was. The rest is as in `label_part`.
    """
    planned = read_plan(Path(out))
    path = model or planned.model
    if path is None:
        raise LabellingError("the plan does not say where the model is; give it with --model.")
    connect(address)
    on_gpu = planned.options.device.startswith("cuda")
    gpus = (1.0 if on_gpu else 0.0) if gpus is None else gpus
    with FolderLock(planned.out, needed=lock, shared=True):
        store = part_store(planned, (0, 1))
        pending = pending_shards(store, planned.rows, retry_failed=retry_failed, relabel_changed=relabel_changed)
        count = min(actors or _room(gpus, cpus), len(pending))
        task = {
            "out": str(planned.out.absolute()),
            "model": path,
            "device": "cuda" if on_gpu else "cpu",
            "threads": max(1, int(cpus)),
            "workers": workers,
            "lock": lock,
        }
        began = time.perf_counter()
        watch = _Watch(planned, task, report or Silent(), stop or threading.Event())
        announce(watch.tally.say, store, pending, planned.rows.passed_over)
        if pending:
            watch.run([shard.index for shard in pending], count, gpus, cpus)
        # what they have written
        store = part_store(planned, (0, 1))
        if watch.left and watch.stopped:
            raise Interrupted(progress(store, watch.tally.kept))
        summary = summarize(store, watch.tally.meter, time.perf_counter() - began)
        watch.tally.say("summary", **asdict(summary))
        return summary


def connect(address: str | None) -> None:
    """Connects this process to a cluster, where it is not connected. Raises LabellingError."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LabellingError(f"there is no Ray cluster at {address}: {reason_of(error)}.") from error


def _room(gpus: float, cpus: float) -> int:
    """Returns how many actors the cluster has room for, one at least: it may grow."""
    there = ray.cluster_resources()
    wanted = {"GPU": gpus, "CPU": cpus}
    return max(1, int(min(there.get(name, 0.0) / share for name, share in wanted.items() if share)))


class Desk:
    """Gives shards to actors, and keeps what they say until the watching process asks."""

    def __init__(self, shards: Iterable[int], numbers: dict[str, int]) -> None:
        self._dispatcher = Dispatcher(shards)
        self._numbers = numbers
        self._said: list[tuple[int, str, dict[str, Any]]] = []
        self._stopped = False

    def claim(self, worker: int) -> int | None:
        return None if self._stopped else self._dispatcher.claim(worker)

    def say(self, worker: int, event: str, fields: dict[str, Any]) -> bool:
        """Takes an event; returns whether the job is to stop."""
        if event == "shard":
            self._dispatcher.done(worker, self._numbers[fields["name"]])
        self._said.append((worker, event, fields))
        return self._stopped

    def release(self, worker: int) -> tuple[list[int], str | None]:
        """Returns the shards of an actor that died, which others may claim now, and why the job cannot succeed."""
        try:
            return self._dispatcher.release(worker), None
        except LabellingError as error:
            return [], str(error)

    def stop(self) -> None:
        self._stopped = True

    def look(self) -> tuple[list[tuple[int, str, dict[str, Any]]], int, int]:
        """Returns what was said since the last look, how many shards wait, and how many are not done."""
        said, self._said = self._said, []
        return said, self._dispatcher.waiting, self._dispatcher.left


class Actor:
    """A model on a device, which labels shards until the desk has no more."""

    def __init__(self, number: int, desk: Any, task: dict[str, Any]) -> None:
        self._number, self._desk, self._task = number, desk, task
        self._model: Any = None

    def run(self) -> tuple[str, bool] | None:
        """Labels; returns what it failed of, and whether that is for the user to mend, or None."""
        import torch

        from spear_fast.checkpoints.load import load_model
        from spear_fast.labelling.parts import label_claimed

        task = self._task
        try:
            if task["device"] == "cpu":
                torch.set_num_threads(task["threads"])
            speaker = _Speaker(self._number, self._desk)
            speaker("process", device=task["device"], pid=os.getpid(), node=os.uname().nodename)
            self._model = self._model or load_model(task["model"])
            label_claimed(
                task["out"],
                self._model,
                lambda: ray.get(self._desk.claim.remote(self._number)),
                device=task["device"],
                report=speaker,
                stop=speaker.stop,
                workers=task["workers"],
                lock=task["lock"],
            )
        except LabellingError as error:
            return reason_of(error), True
        except (Interrupted, RayActorError) as error:
            # it is to stop, or its desk is gone and the job with it
            return None if isinstance(error, Interrupted) else (reason_of(error), True)
        except Exception as error:
            return reason_of(error), False
        return None


class _Speaker:
    """Tells the desk what happens; hears from it when to stop."""

    def __init__(self, number: int, desk: Any) -> None:
        self.stop = threading.Event()
        self._number, self._desk = number, desk

    def __call__(self, event: str, **fields: Any) -> None:
        if ray.get(self._desk.say.remote(self._number, event, fields)):
            self.stop.set()

    def close(self) -> None:
        return None


class _Watch:
    """The watching side of a run. left: shards that are not done. stopped: whether they were told to stop."""

    def __init__(self, planned: JobPlan, task: dict[str, Any], report: Reporter, stop: threading.Event) -> None:
        self.tally = Tally(report)
        self.left = 0
        self.stopped = False
        self._numbers = {shard.name: shard.index for shard in planned.shards}
        self._task, self._stop = task, stop
        self._deaths = 0
        self._heard = False
        self._actors: dict[int, Any] = {}

    def run(self, shards: list[int], count: int, gpus: float, cpus: float) -> None:
        """Labels shards with so many actors. Raises LabellingError when that cannot succeed."""
        # on this node: if it is lost, so is the job
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote(shards, self._numbers)
        # one that dies is not restarted but replaced: what a process of its number says late is nobody else's
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(Actor).options(**options)
        try:
            self._watch(desk, lambda number: actor.remote(number, desk, self._task), count)
        finally:
            for actor in (*self._actors.values(), desk):
                ray.kill(actor)

    def _watch(self, desk: Any, make: Callable[[int], Any], count: int) -> None:
        numbers, began = itertools.count(), time.monotonic()
        # of what runs, its actor; actors that have nothing to do
        running: dict[Any, int] = {}
        idle: list[int] = []

        def begin() -> None:
            number = next(numbers)
            self._actors[number] = make(number)
            running[self._actors[number].run.remote()] = number

        for _ in range(count):
            begin()
        while True:
            if self._stop.is_set() and not self.stopped:
                self.stopped = True
                ray.get(desk.stop.remote())
            done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            waiting = self._look(desk, count)
            for ref in done:
                number = running.pop(ref)
                how = self._end_of(ref)
                if how is None:
                    idle.append(number)
                    continue
                waiting += self._lose(desk, number, how, count)
                if not self.stopped:
                    begin()
            # what one gave back after others had ended
            while idle and waiting and not self.stopped:
                number = idle.pop()
                running[self._actors[number].run.remote()] = number
                waiting -= 1
            if not self.left or not running:
                return
            if not self._heard and time.monotonic() - began > PATIENCE_SECONDS:
                self._heard = True
                there = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
                self.tally.say("warning", message=f"no actor has begun yet: the cluster has {there}; waiting for more.")

    def _look(self, desk: Any, workers: int) -> int:
        """Passes on what was said, and returns how many shards wait for somebody."""
        said, waiting, self.left = ray.get(desk.look.remote())
        for worker, event, fields in said:
            self._heard = True
            if event == "shard":
                self._deaths = 0
            self.tally.take(worker, event, {**fields, "actor": worker}, workers)
        return waiting

    def _end_of(self, ref: Any) -> str | None:
        """Returns what a run died of, None when it ended. Raises LabellingError for what the user must mend."""
        try:
            failure = ray.get(ref)
        except RayActorError as error:
            return reason_of(error).partition(" The actor")[0].rstrip(".")
        if failure is None:
            return None
        how, of_all = failure
        if of_all:
            raise LabellingError(how)
        return how

    def _lose(self, desk: Any, number: int, how: str, workers: int) -> int:
        """Gives the shards of an actor that died to others and returns how many; raises when that leads nowhere."""
        # its device may have failed, which the same process cannot use again
        ray.kill(self._actors.pop(number))
        shards, problem = ray.get(desk.release.remote(number))
        gone = f"; the others do the shards that it was at: {len(shards)}" if shards else ""
        self.tally.say("warning", message=f"actor {number} has died of {how}{gone}.")
        self.tally.lose(number)
        self._deaths += 1
        if problem is None and self._deaths > MOST_DEATHS * workers:
            problem = f"{self._deaths} actors have died and no shard has been written; the last one of {how}."
        if problem is not None:
            raise LabellingError(problem)
        return len(shards)
