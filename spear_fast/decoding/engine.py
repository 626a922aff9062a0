"""The engine: requests in, results out as each is finished, many utterances in flight.

A step works on all utterances in flight. One that is finished leaves at once, and a waiting one takes its place, so
that a row which goes on and on holds up nobody.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spear_fast.decoding.budget import Plan
from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.encoder import Encoder, tokens_together
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.refusal import is_memory, refusal
from spear_fast.decoding.request import Ticket
from spear_fast.decoding.result import DecodingResult
from spear_fast.decoding.settings import new_seed
from spear_fast.decoding.slots import Slots
from spear_fast.decoding.workers import Workers


@dataclass
class _Request:
    """A request on its way.

    source: ids `[n]` int64 on the host, or what an encoder made of them, `[n, dim]`. seed: of its draws.
    memory: `[n, dim]`, encoded, until it has a place.
    """

    ticket: Ticket
    source: Tensor
    options: DecodingOptions
    seed: int
    memory: Tensor | None = None

    @property
    def settled(self) -> bool:
        return self.ticket.done()


# utterances that come at once whose encoding leaves memory that is worth giving back; it takes milliseconds
MANY = 8

Outcomes = list[tuple[Ticket, DecodingResult | BaseException]]


class Engine:
    """Decodes requests with one model, up to `plan.slots` at a time.

    encoder, decoder: packed weights of the model's two sides; `TextToSemantic.engine` gives both. Without an encoder it
        takes sources that are encoded already.
    plan: sizes of the buffers, see `Plan`. encode_tokens: most source tokens that are encoded together, by
        default as many as the kind of device likes.
    guided: whether requests may have a `cond_scale` above 1; each step then also decodes without the source.
    deterministic: the same bits for a request alone and in any company or order, by an engine of the same plan: sources
        are encoded one by one, and where a product's bits depend on its number of rows, as on GPUs, every step works on
        all places, free ones too.

    Use it as a context manager, or call `close`. One thread at a time makes steps: whoever asks for results, or, after
    `start`, a thread of the engine's own.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        decoder: Decoder,
        plan: Plan,
        *,
        encode_tokens: int | None = None,
        guided: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.encoder, self.decoder, self.plan = encoder, decoder, plan
        self.guided, self.deterministic = guided, deterministic
        # one source at a time: the first always fits
        most = tokens_together(decoder.device) if encode_tokens is None else encode_tokens
        self.encode_tokens = 0 if deterministic else most
        self._slots: Slots | Workers | None = None
        # (minus the source's length, number): the longest first, the earlier one among equals
        self._waiting: list[tuple[int, int, _Request]] = []
        self._encoded: deque[_Request] = deque()
        # taken from a queue and not yet in a place
        self._moving: list[_Request] = []
        self._numbers = itertools.count()
        # guards the queues; steps are made outside of it, and tickets settled outside of both locks
        self._lock = threading.RLock()
        self._stepping = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self,
        source: Tensor,
        options: DecodingOptions | None = None,
        *,
        callback: Callable[[Ticket], Any] | None = None,
        tag: Any = None,
    ) -> Ticket:
        """Takes a request and returns its ticket at once. A request that cannot be served fails alone, in its ticket.

        source: `[n]` integer ids, an end-of-sequence included where the model wants one; or `[n, dim]` floating point,
        a memory as the encoder gives it, which is not encoded again. options: by default beam search with the engine's
        beams. callback: called with the ticket when it is done.
        """
        options = options or DecodingOptions(beam_size=self.plan.beams, max_length=self.plan.max_length)
        if isinstance(source, Tensor) and not is_memory(source):
            # looked at here, and sent to the device together with others
            source = source.cpu()
        wrong = refusal(source, options, encoder=self.encoder, decoder=self.decoder, plan=self.plan, guided=self.guided)
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed and takes no more requests; make another one.")
            ticket = Ticket(self, next(self._numbers), tag)
            if wrong is None:
                source = source if is_memory(source) else source.long()
                request = _Request(ticket, source, options, new_seed(options))
                heapq.heappush(self._waiting, (-len(source), ticket.number, request))
                self._wake.notify_all()
        if callback is not None:
            ticket.add_done_callback(callback)  # type: ignore[arg-type]
        if wrong is not None:
            ticket.settle(wrong)
        return ticket

    def run(
        self,
        sources: Iterable[Tensor | tuple[Tensor, DecodingOptions]],
        options: DecodingOptions | None = None,
        *,
        ahead: int | None = None,
    ) -> Iterator[Ticket]:
        """Yields the tickets of all sources as they are done; `ticket.number` counts the engine's requests in order.

        sources: as `submit` takes them, alone or with options of their own; taken as places come free.
        ahead: how many wait at most; more of them make batches of more equal lengths.
        """
        ahead = 8 * self.plan.slots if ahead is None else ahead
        done: deque[Ticket] = deque()
        incoming, pending, exhausted = iter(sources), 0, False
        while True:
            while not exhausted and self.waiting < ahead:
                try:
                    item = next(incoming)
                except StopIteration:
                    exhausted = True
                    break
                source, own = item if isinstance(item, tuple) else (item, options)
                self.submit(source, own, callback=done.append)
                pending += 1
            while done:
                pending -= 1
                yield done.popleft()
            if exhausted and not pending:
                return
            self._advance_or_wait()

    def step(self) -> None:
        """Gives free places away, makes a step of all that is in flight, and hands over what is done."""
        self._advance_or_wait()

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting) + len(self._encoded)

    @property
    def in_flight(self) -> int:
        """Requests that are being decoded."""
        slots = self._slots
        return 0 if slots is None else sum(not seat.owner.settled for seat in slots.taken)

    def start(self) -> Engine:
        """Lets a thread of its own make the steps, so that tickets are done without anybody asking; for servers."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, name="spear_fast engine", daemon=True)
                self._thread.start()
        return self

    def withdraw(self, ticket: Ticket) -> bool:
        """Takes a request back; see `Ticket.cancel`."""
        with self._lock:
            if ticket.done():
                return False
            self._waiting = [entry for entry in self._waiting if entry[2].ticket is not ticket]
            heapq.heapify(self._waiting)
            self._encoded = deque(request for request in self._encoded if request.ticket is not ticket)
        # where it is further on, the next step drops what is settled
        ticket.settle(CancelledError())
        return ticket.cancelled()

    def close(self) -> None:
        """Takes back all that waits or is in flight, and frees the buffers."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping, self._lock:
            requests = [*self._evicted(), *self._encoded, *(request for _, _, request in self._waiting)]
            self._waiting, self._encoded = [], deque()
        for request in requests:
            request.ticket.settle(CancelledError())

    def drive(self, ticket: Ticket) -> None:
        """Makes steps until a ticket is done, unless the engine's thread makes them."""
        while not ticket.done() and self._thread is None and not self._closed:
            self._advance_or_wait()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._closed or self.waiting or self.in_flight):
                    self._wake.wait()
                if self._closed:
                    return
            self._advance()

    def _advance_or_wait(self) -> None:
        if self._thread is None:
            self._advance()
            return
        with self._lock:
            self._wake.wait(timeout=0.01)

    def _advance(self) -> None:
        """Gives free places away, makes steps of all that is in flight, and hands over what is done."""
        with self._stepping:
            try:
                outcomes = self._make_steps()
            except torch.OutOfMemoryError:
                outcomes = self._shrunk()
            except Exception as error:
                # of all that took part; what waits goes on with fresh buffers
                outcomes = [(request.ticket, error) for request in self._evicted()]
        # a callback may ask for other results, submit, cancel or close
        for ticket, outcome in outcomes:
            ticket.settle(outcome)
        with self._lock:
            self._wake.notify_all()

    @torch.inference_mode()
    def _make_steps(self) -> Outcomes:
        if self._closed:
            return []
        if self._slots is None:
            self._slots = self.plan.make(self.decoder, guided=self.guided, fixed=self.deterministic)
        slots = self._slots
        slots.drop(lambda request: request.settled)
        self._admit(slots)
        if not slots.used:
            return []
        slots.proceed()
        return [(request.ticket, result) for request, result in slots.harvest()]

    def _admit(self, slots: Slots | Workers) -> None:
        free = slots.count - slots.used
        while len(self._encoded) < free and self._waiting:
            self._encode()
        with self._lock:
            self._moving = [self._encoded.popleft() for _ in range(min(free, len(self._encoded)))]
        memories = [request.memory for request in self._moving if request.memory is not None]
        if memories:
            options, seeds = zip(*((request.options, request.seed) for request in self._moving), strict=True)
            slots.admit(self._moving, memories, options, seeds)
        admitted = len(self._moving)
        for request in self._moving:
            request.memory = None
        self._moving = []
        if admitted >= max(MANY, slots.count // 2) and self.decoder.native is not None:
            # what encoding so many held in between would be kept beside the caches, which fill up from now on
            torch.ops.spear_fast.give_memory_back()

    def _encode(self) -> None:
        """Encodes the longest that wait, as many as `encode_tokens` hold and at least one."""
        tokens = 0
        with self._lock:
            while self._waiting and (not self._moving or tokens - self._waiting[0][0] <= self.encode_tokens):
                length, _, request = heapq.heappop(self._waiting)
                tokens -= length
                self._moving.append(request)
        raw = [request for request in self._moving if not is_memory(request.source)]
        if raw and self.encoder is not None:
            memories = self.encoder.encoded([request.source for request in raw])
            for request, memory in zip(raw, memories, strict=True):
                request.memory = memory
        for request in self._moving:
            request.memory = request.source if request.memory is None else request.memory
        with self._lock:
            self._encoded.extend(request for request in self._moving if not request.settled)
            self._moving = []

    def _evicted(self) -> list[_Request]:
        """Takes all requests out of the places and off the way, and lets go of the buffers; returns them."""
        requests = [*(seat.owner for seat in (self._slots.taken if self._slots is not None else ())), *self._moving]
        if isinstance(self._slots, Workers):
            self._slots.close()
        self._slots, self._moving = None, []
        return requests

    def _shrunk(self) -> Outcomes:
        """Halves the places and begins again with what was in flight; with a single place the memory is too small."""
        requests = self._evicted()
        if self.plan.slots == 1:
            error = MemoryError("not even one utterance fits into the device's memory; use fewer beams.")
            return [(request.ticket, error) for request in requests]
        self.plan = self.plan.halved()
        self.encode_tokens //= 2
        with self._lock:
            for request in requests:
                request.memory = None
                heapq.heappush(self._waiting, (-len(request.source), request.ticket.number, request))
        return []
