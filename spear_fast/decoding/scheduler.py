"""The scheduler: requests wait, are encoded, get a slot, and leave it as soon as they are done.

The longest sources go first, so that those encoded together are of like lengths. Where memory runs out the slots are
halved, and what was in flight begins again.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from itertools import pairwise

import torch

from spear_fast.decoding import process
from spear_fast.decoding.config import EngineConfig
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.encoder import Encoder, tokens_together
from spear_fast.decoding.request import Request
from spear_fast.decoding.runner import Outcome, Runner
from spear_fast.decoding.workers import WorkerPool
from spear_fast.ops.registry import without_autocast


def fills_groups(device: torch.device) -> bool:
    """Returns whether batch-invariant encoding fills groups up to one size, rather than encode each source alone."""
    return device.type != "cpu"


class Scheduler:
    """Queues of requests over one runner, or one of each worker. One thread at a time may call `step` or `evict`.

    encoder, decoder, config, encode_tokens, guided, deterministic: see `Engine`. lock: guards the queues.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        decoder: Decoder,
        config: EngineConfig,
        *,
        encode_tokens: int | None,
        guided: bool,
        deterministic: bool,
        lock: threading.RLock,
    ) -> None:
        self.encoder, self.decoder, self.config = encoder, decoder, config
        self.guided, self.deterministic = guided, deterministic
        self.encode_tokens = tokens_together(decoder.device) if encode_tokens is None else encode_tokens
        # a GPU encodes groups of one size; a CPU gains nothing by that and encodes one source at a time: the first
        # always fits
        self._fills_groups = deterministic and fills_groups(decoder.device)
        if deterministic and not self._fills_groups:
            self.encode_tokens = 0
        self._lock = lock
        self._runner: Runner | WorkerPool | None = None
        # (minus the source's length, number): the longest first, the earlier one among equals
        self._waiting: list[tuple[int, int, Request]] = []
        self._encoded: deque[Request] = deque()
        # taken from a queue and not yet in a slot
        self._moving: list[Request] = []

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting) + len(self._encoded)

    @property
    def in_flight(self) -> int:
        """Requests that are being decoded."""
        runner = self._runner
        return 0 if runner is None else sum(not request.done() for request in runner.requests)

    @property
    def runner(self) -> Runner | WorkerPool | None:
        """The buffers; None before the first step and after they have been let go."""
        return self._runner

    def add(self, request: Request) -> None:
        """Lets a request wait."""
        with self._lock:
            heapq.heappush(self._waiting, (-request.length, request.number, request))

    def remove(self, request: Request) -> None:
        """Takes a request out of the queues; where it is further on, the next step drops what is done."""
        with self._lock:
            self._waiting = [entry for entry in self._waiting if entry[2] is not request]
            heapq.heapify(self._waiting)
            self._encoded = deque(each for each in self._encoded if each is not request)

    def step(self) -> list[Outcome]:
        """Gives free slots away and makes a step of all that is in flight; returns what is done, or has failed.

        An interrupt is raised; which requests it took along, their owner knows.
        """
        try:
            with torch.inference_mode(), without_autocast(self.decoder.device.type):
                return self._step()
        except Exception as error:
            if is_out_of_memory(error):
                return self._halve(error)
            # of all that took part; what waits gets fresh buffers
            return [(request, error) for request in self.evict()]

    def evict(self) -> list[Request]:
        """Takes all requests out of the slots and off the way, and lets go of the buffers; returns them."""
        runner, self._runner = self._runner, None
        requests = [*(runner.requests if runner is not None else ()), *self._moving]
        if runner is not None:
            runner.close()
        self._moving = []
        return requests

    def _step(self) -> list[Outcome]:
        if self._runner is None:
            if not self.waiting:
                return []
            try:
                self._runner = self._allocate()
            # whatever the reason, what waits could never be served
            except Exception as error:
                return self._halve(error)
        runner = self._runner
        runner.drop(lambda request: request.done())
        self._admit(runner)
        if runner.used:
            runner.step()
        return runner.collect_finished() if runner.requests else []

    def _allocate(self) -> Runner | WorkerPool:
        config = self.config
        workers = min(config.workers, config.slots)
        bounds = [config.slots * i // workers for i in range(workers + 1)]
        parts = [
            Runner(
                self.decoder,
                slots=end - begin,
                beams=config.beams,
                # the last token is an input too, in the step after the end
                positions=config.max_length + 1,
                max_source=config.max_source,
                guided=self.guided,
                fixed=self.deterministic,
                kv_dtype=config.kv_dtype,
            )
            for begin, end in pairwise(bounds)
        ]
        return WorkerPool(parts, torch.get_num_threads()) if workers > 1 else parts[0]

    def _admit(self, runner: Runner | WorkerPool) -> None:
        free = runner.slots - runner.used
        while len(self._encoded) < free and self._waiting:
            self._encode()
        with self._lock:
            self._moving = [self._encoded.popleft() for _ in range(min(free, len(self._encoded)))]
        if not self._moving:
            return
        admitted = len(self._moving)
        runner.admit(self._moving)
        for request in self._moving:
            request.memory = None
        self._moving = []
        if self.decoder.fused is not None:
            process.give_memory_back_after_admission(admitted, runner.slots)

    def _encode(self) -> None:
        """Encodes the longest that wait, as many as `encode_tokens` hold and at least one."""
        tokens = 0
        with self._lock:
            while self._waiting and (not self._moving or tokens - self._waiting[0][0] <= self.encode_tokens):
                length, _, request = heapq.heappop(self._waiting)
                tokens -= length
                self._moving.append(request)
        raw = [request for request in self._moving if request.memory is None]
        if raw and self.encoder is not None:
            multiple = max(1, self.encode_tokens) if self._fills_groups else 1
            memories = self.encoder.encoded([request.source for request in raw], multiple=multiple)
            for request, memory in zip(raw, memories, strict=True):
                request.memory = memory
        with self._lock:
            self._encoded.extend(request for request in self._moving if not request.done())
            self._moving = []

    def _wait_again(self, requests: list[Request]) -> None:
        for request in requests:
            request.begin_again()
            self.add(request)

    def _halve(self, error: Exception) -> list[Outcome]:
        """Halves the slots and begins again with what was in flight; with a single slot the memory is too small."""
        requests = self.evict()
        if self.config.slots > 1:
            self.config = self.config.halved()
            self.encode_tokens //= 2
            self._wait_again(requests)
            return []
        with self._lock:
            # where not even the buffers could be made, nothing that waits could ever be served
            waiting = [] if requests else [*self._encoded, *(request for _, _, request in self._waiting)]
            if waiting:
                self._waiting, self._encoded = [], deque()
        config = self.config
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        lack = MemoryError(
            f"not even one utterance fits into the memory of {self.decoder.device}: with {config.beams} beams, "
            f"{config.max_length} tokens and {config.max_source} source tokens its slot takes up to "
            f"{config.slot_bytes:,} bytes; lower one of them ({said})."
        )
        lack.__cause__ = error
        return [(request, lack) for request in (*requests, *waiting)]


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an allocation failed; on a CPU torch raises a RuntimeError then."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("can't allocate memory", "not enough memory")
    )
