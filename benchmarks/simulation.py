"""A simulation of one labelling job on many GPUs: nodes that are preempted or lost, GPUs that are slow, shards in turn.

Time is in seconds. Everything random comes from one seed, faults from a stream of their own: jobs of different shards
meet the same faults.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Faults:
    """What goes wrong. preempted: mean seconds between two preemptions of a node, which is away for `away` seconds.

    slow: GPUs of half the speed; the others differ by `spread`, a share. lost: nodes that are gone for good after
    `lost_at`, a share of the time that the job takes without faults.
    """

    preempted: float | None = None
    away: tuple[float, float] = (300.0, 1800.0)
    slow: int = 0
    spread: float = 0.0
    lost: int = 0
    lost_at: float = 0.5


@dataclass(frozen=True)
class Cluster:
    """Nodes with so many GPUs each. start: seconds until a process has its model and labels."""

    nodes: int = 8
    gpus: int = 8
    start: float = 20.0

    @property
    def size(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Way:
    """How shards come to GPUs. parts: None, and each GPU claims the next shard as it has room, one ahead; or so many
    parts of the shards, each a process of its own, which wait in a queue.

    journal: whether a shard is resumed where its worker died, or begun again.
    """

    parts: int | None = None
    journal: bool = True


@dataclass
class _Unit:
    """What is taken at once: a shard or a part. left: seconds of work of a GPU of speed 1; step: of a shard of it."""

    left: float
    step: float
    done: float = 0.0


@dataclass
class _Gpu:
    node: int
    speed: float
    held: deque[_Unit] = field(default_factory=deque)
    # of the unit that it is at: since when it works; None where it is away or idle
    since: float | None = None
    # counts what was begun: an end of anything earlier is no longer true
    turn: int = 0


@dataclass(frozen=True)
class Outcome:
    """seconds: until the last shard. perfect: with the same faults, were no GPU that is there ever idle."""

    seconds: float
    perfect: float

    @property
    def loss(self) -> float:
        """The share of time that is lost beyond what nobody could help."""
        return self.seconds / self.perfect - 1


def simulate(shards: int, shard_seconds: float, cluster: Cluster, faults: Faults, way: Way, seed: int) -> Outcome:
    """Returns how long a job of so many shards takes, each of `shard_seconds` on a GPU of speed 1."""
    return _Simulation(shards, shard_seconds, cluster, faults, way, random.Random(seed)).run()


class _Simulation:
    def __init__(
        self, shards: int, shard_seconds: float, cluster: Cluster, faults: Faults, way: Way, chance: random.Random
    ) -> None:
        self._cluster, self._way = cluster, way
        self._work = shards * shard_seconds
        speeds = [max(0.2, chance.gauss(1.0, faults.spread)) for _ in range(cluster.size)]
        for index in chance.sample(range(cluster.size), faults.slow):
            speeds[index] = 0.5
        self._gpus = [_Gpu(index // cluster.gpus, speed) for index, speed in enumerate(speeds)]
        self._absences = self._draw(faults, chance)
        if way.parts is None:
            units = [_Unit(shard_seconds, shard_seconds) for _ in range(shards)]
        else:
            # part I of N has the shards I, I + N, …
            sizes = [len(range(part, shards, way.parts)) for part in range(way.parts)]
            units = [_Unit(size * shard_seconds, shard_seconds) for size in sizes if size]
        self._waiting = deque(units)
        self._open = len(units)
        self._events: list[tuple[float, int, str, int, int]] = []
        self._counter = 0
        self._away: set[int] = set()

    def _draw(self, faults: Faults, chance: random.Random) -> list[tuple[float, float, int]]:
        """Returns the absences of nodes: from, until, node."""
        ideal = self._work / self._cluster.size
        lost = set(chance.sample(range(self._cluster.nodes), faults.lost))
        absences = []
        for node in range(self._cluster.nodes):
            time, end = 0.0, ideal * faults.lost_at if node in lost else 20 * ideal
            while faults.preempted is not None:
                time += chance.expovariate(1 / faults.preempted)
                if time >= end:
                    break
                back = time + chance.uniform(*faults.away)
                absences.append((time, min(back, end), node))
                time = back
            if node in lost:
                absences.append((end, float("inf"), node))
        return absences

    def run(self) -> Outcome:
        for start, stop, node in self._absences:
            self._add(start, "leave", node)
            if stop != float("inf"):
                self._add(stop, "return", node)
        for index in range(len(self._gpus)):
            self._begin(0.0, index, start=True)
        now = 0.0
        while self._open:
            now, _, kind, number, turn = heapq.heappop(self._events)
            if kind == "end":
                self._end(now, number, turn)
            elif kind == "leave":
                self._leave(now, number)
            else:
                self._away.discard(number)
                for index, gpu in enumerate(self._gpus):
                    if gpu.node == number:
                        self._begin(now, index, start=True)
        return Outcome(now, self._perfect())

    def _add(self, time: float, kind: str, number: int, turn: int = 0) -> None:
        self._counter += 1
        heapq.heappush(self._events, (time, self._counter, kind, number, turn))

    def _begin(self, now: float, index: int, *, start: bool) -> None:
        """Lets a GPU take what it has room for, and work at the first of it."""
        gpu = self._gpus[index]
        # tokens of a shard are read while the one before is labelled
        room = 2 if self._way.parts is None else 1
        while len(gpu.held) < room and self._waiting:
            gpu.held.append(self._waiting.popleft())
        if not gpu.held:
            return
        gpu.since = now + (self._cluster.start if start or self._way.parts is not None else 0.0)
        gpu.turn += 1
        self._add(gpu.since + gpu.held[0].left / gpu.speed, "end", index, gpu.turn)

    def _end(self, now: float, index: int, turn: int) -> None:
        gpu = self._gpus[index]
        if turn != gpu.turn or gpu.since is None:
            return
        gpu.held.popleft()
        gpu.since = None
        self._open -= 1
        self._begin(now, index, start=False)

    def _leave(self, now: float, node: int) -> None:
        """Takes a node away: what its GPUs held waits for others, as far as it was written."""
        self._away.add(node)
        returned = []
        for gpu in self._gpus:
            if gpu.node != node:
                continue
            if gpu.since is not None and gpu.held:
                unit = gpu.held[0]
                done = max(0.0, now - gpu.since) * gpu.speed
                whole = unit.done + done
                kept = whole if self._way.journal else whole // unit.step * unit.step
                unit.left += unit.done - kept
                unit.done = kept
            returned += gpu.held
            gpu.held.clear()
            gpu.since = None
            gpu.turn += 1
        self._waiting.extendleft(reversed(returned))
        # those that had nothing to do
        for index, gpu in enumerate(self._gpus):
            if gpu.since is None and gpu.node not in self._away:
                self._begin(now, index, start=self._way.parts is not None)

    def _perfect(self) -> float:
        """Returns when all work is done at the earliest: every GPU that is there works at its own speed."""
        total = sum(gpu.speed for gpu in self._gpus)
        speed_of = [sum(gpu.speed for gpu in self._gpus if gpu.node == node) for node in range(self._cluster.nodes)]
        changes = [(start, -speed_of[node]) for start, _, node in self._absences]
        changes += [(stop, speed_of[node]) for _, stop, node in self._absences if stop != float("inf")]
        now, left, speed = 0.0, self._work, total
        for time, change in sorted(changes):
            if left <= (time - now) * speed:
                break
            left -= (time - now) * speed
            now, speed = time, speed + change
        return now + left / speed


def losses(
    shards: int, shard_seconds: float, cluster: Cluster, faults: Faults, way: Way, seeds: Sequence[int]
) -> list[Outcome]:
    """Returns the outcome of each seed."""
    return [simulate(shards, shard_seconds, cluster, faults, way, seed) for seed in seeds]
