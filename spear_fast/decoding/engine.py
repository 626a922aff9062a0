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
from spear_fast.decoding.encoder import Encoder
from spear_fast.decoding.loop import in_lockstep
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.request import Ticket
from spear_fast.decoding.settings import new_seed
from spear_fast.decoding.slots import Slots
from spear_fast.decoding.step import advance

# steps between two looks at who is done, where a look makes the host wait
SHORTEST_INTERVAL, LONGEST_INTERVAL = 2, 32


@dataclass
class _Waiting:
    """A request that has no place yet.

    seed: of its draws. memory: what the encoder made of it, `[n, dim]`, once it has.
    """

    ticket: Ticket
    source: Tensor
    options: DecodingOptions
    seed: int
    memory: Tensor | None = None


class Engine:
    """Decodes requests with one model, up to `plan.slots` at a time.

    encoder, decoder: packed weights of the model's two sides; `TextToSemantic.engine` gives both.
    plan: sizes of the buffers, see `Plan`. encode_tokens: most source tokens that are encoded together.
    guided: whether requests may have a `cond_scale` above 1; each step then also decodes without the source.
    deterministic: the same bits for a request alone and in any company or order, by an engine of the same plan: sources
        are encoded one by one, and every step works on all places, free ones too.

    Use it as a context manager, or call `close`. One thread at a time makes steps: whoever asks for results, or, after
    `start`, a thread of the engine's own.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        plan: Plan,
        *,
        encode_tokens: int = 8192,
        guided: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.encoder, self.decoder, self.plan = encoder, decoder, plan
        self.guided, self.deterministic = guided, deterministic
        # one source at a time: the first always fits
        self.encode_tokens = 0 if deterministic else encode_tokens
        self._slots: Slots | None = None
        self._flying: dict[int, _Waiting] = {}
        # (minus the source's length, number): the longest first, the earlier one among equals
        self._waiting: list[tuple[int, int, _Waiting]] = []
        self._encoded: deque[_Waiting] = deque()
        self._withdrawn: set[Ticket] = set()
        self._numbers = itertools.count()
        # guards the queues; steps are made outside of it
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

        source: `[n]` integer ids, an end-of-sequence included where the model wants one. options: by default beam
        search with the engine's beams. callback: called with the ticket when it is done.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed and takes no more requests; make another one.")
            ticket = Ticket(self, next(self._numbers), tag)
            if callback is not None:
                ticket.add_done_callback(callback)  # type: ignore[arg-type]
            options = options or DecodingOptions(beam_size=self.plan.beams, max_length=self.plan.max_length)
            wrong = self._refusal(source, options)
            if wrong is not None:
                ticket.fail(wrong)
                return ticket
            ids = source.to(device=self.decoder.device, dtype=torch.int64)
            heapq.heappush(self._waiting, (-len(ids), ticket.number, _Waiting(ticket, ids, options, new_seed(options))))
            self._wake.notify_all()
        return ticket

    def run(
        self,
        sources: Iterable[Tensor | tuple[Tensor, DecodingOptions]],
        options: DecodingOptions | None = None,
        *,
        ahead: int | None = None,
    ) -> Iterator[Ticket]:
        """Yields the tickets of all sources as they are done; `ticket.number` counts the engine's requests in order.

        sources: ids `[n]` each, alone or with options of its own; taken from the iterable as places come free.
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
        return len(self._flying)

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
            ticket.fail(CancelledError())
            self._withdrawn.add(ticket)
            self._waiting = [entry for entry in self._waiting if entry[2].ticket is not ticket]
            heapq.heapify(self._waiting)
            self._encoded = deque(entry for entry in self._encoded if entry.ticket is not ticket)
            self._wake.notify_all()
        return True

    def close(self) -> None:
        """Takes back all that waits or is in flight, and frees the buffers."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            tickets = [entry.ticket for _, _, entry in self._waiting]
            tickets += [entry.ticket for entry in (*self._encoded, *self._flying.values())]
            self._waiting, self._encoded = [], deque()
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            self._flying, self._slots = {}, None
        for ticket in tickets:
            ticket.fail(CancelledError())

    def drive(self, ticket: Ticket) -> None:
        """Makes steps until a ticket is done, unless the engine's thread makes them."""
        while not ticket.done() and self._thread is None and not self._closed:
            self._advance_or_wait()

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._closed or self.waiting or self._flying):
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
        """Makes one step of all that is in flight, after giving free places away; hands over what is done."""
        with self._stepping:
            try:
                self._make_step()
            except torch.OutOfMemoryError:
                self._shrink()
            except Exception as error:
                self._fail_flying(error)
        with self._lock:
            self._wake.notify_all()

    @torch.inference_mode()
    def _make_step(self) -> None:
        self._drop_withdrawn()
        self._admit()
        if not self._flying:
            return
        assert self._slots is not None
        view = self._slots.view()
        flying = (self._flying.get(place) for place in range(view.batch))
        options = [None if entry is None else entry.options for entry in flying]
        for _ in range(self._interval()):
            advance(self.decoder, view, options)
        self._hand_over()

    def _interval(self) -> int:
        """Returns how many steps to make before looking who is done; on the CPU a look costs nothing."""
        if self.decoder.device.type == "cpu":
            return 1
        return SHORTEST_INTERVAL if self.waiting else min(LONGEST_INTERVAL, 2 * SHORTEST_INTERVAL)

    def _admit(self) -> None:
        free = self.plan.slots - len(self._flying)
        if not free or not self.waiting:
            return
        while len(self._encoded) < free and self._waiting:
            self._encode()
        chosen: list[_Waiting] = []
        with self._lock:
            while self._encoded and len(chosen) < free:
                chosen.append(self._encoded.popleft())
        if not chosen:
            return
        if self._slots is None:
            self._slots = self.plan.make(self.decoder, guided=self.guided, fixed=self.deterministic)
        memories = [entry.memory for entry in chosen if entry.memory is not None]
        places = self._slots.admit(memories, [entry.options for entry in chosen], [entry.seed for entry in chosen])
        for place, entry in zip(places, chosen, strict=True):
            entry.memory = None
            self._flying[place] = entry

    def _encode(self) -> None:
        """Encodes the longest that wait, as many as `encode_tokens` hold and at least one."""
        chosen: list[_Waiting] = []
        tokens = 0
        with self._lock:
            while self._waiting and (not chosen or tokens - self._waiting[0][0] <= self.encode_tokens):
                length, _, entry = heapq.heappop(self._waiting)
                tokens -= length
                chosen.append(entry)
        if not chosen:
            return
        lengths = torch.tensor([len(entry.source) for entry in chosen])
        memory = self.encoder(torch.cat([entry.source for entry in chosen]), lengths)
        for entry, part in zip(chosen, memory.split(lengths.tolist()), strict=True):
            entry.memory = part
        with self._lock:
            self._encoded.extend(entry for entry in chosen if not entry.ticket.done())

    def _hand_over(self) -> None:
        assert self._slots is not None
        done = self._slots.all.done.tolist()
        places = [place for place in self._flying if done[place]]
        if not places:
            return
        entries = [self._flying[place] for place in places]
        results = self._slots.collect(places, [entry.options for entry in entries])
        self._free(places)
        for entry, result in zip(entries, results, strict=True):
            entry.ticket.resolve(result)

    def _drop_withdrawn(self) -> None:
        with self._lock:
            withdrawn, self._withdrawn = self._withdrawn, set()
        places = [place for place, entry in self._flying.items() if entry.ticket in withdrawn]
        if places:
            self._free(places)

    def _free(self, places: list[int]) -> None:
        assert self._slots is not None
        for place in places:
            del self._flying[place]
        for origin, target in self._slots.release(places).items():
            self._flying[target] = self._flying.pop(origin)

    def _fail_flying(self, error: Exception) -> None:
        """An error of the step itself is one of all that took part; what waits goes on with fresh buffers."""
        entries, self._flying, self._slots = list(self._flying.values()), {}, None
        for entry in entries:
            entry.ticket.fail(error)

    def _shrink(self) -> None:
        """Halves the places and begins again with what was in flight; with a single place the memory is too small."""
        entries, self._flying, self._slots = list(self._flying.values()), {}, None
        if self.plan.slots == 1:
            for entry in entries:
                entry.ticket.fail(MemoryError("not even one utterance fits into the device's memory; use fewer beams."))
            return
        self.plan = self.plan.halved()
        with self._lock:
            for entry in entries:
                heapq.heappush(self._waiting, (-len(entry.source), entry.ticket.number, entry))

    def _refusal(self, source: Tensor, options: DecodingOptions) -> Exception | None:
        """Returns why a request cannot be served, or None."""
        plan = self.plan
        if (
            not isinstance(source, Tensor)
            or source.ndim != 1
            or source.is_floating_point()
            or source.dtype == torch.bool
        ):
            got = f"{source.dtype} {list(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
            return ValueError(f"source must be a tensor of integer ids [n], got {got}.")
        if not 0 < len(source) <= plan.max_source:
            return ValueError(
                f"source must have 1 to {plan.max_source} ids, the engine's max_source, got {len(source)}; split it or "
                "make an engine with a larger one."
            )
        low, high = (int(bound) for bound in torch.aminmax(source))
        vocabulary = self.encoder.embedding.shape[0]
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            return ValueError(f"source ids must lie in 0..{vocabulary - 1}, got {wrong}; is it another model's?")
        if options.hypotheses > plan.beams:
            return ValueError(
                f"a request may have up to {plan.beams} hypotheses, the engine's beams, got {options.hypotheses}; make "
                "an engine with more."
            )
        if options.max_length > plan.max_length:
            return ValueError(
                f"max_length may be up to {plan.max_length}, the engine's, got {options.max_length}; make an engine "
                "with a larger one."
            )
        if any(token >= self.decoder.vocab_size for token in options.prefix):
            return ValueError(
                f"prefix must hold ids in 0..{self.decoder.vocab_size - 1}, got {max(options.prefix)}; is it another "
                "model's?"
            )
        if options.guided and not self.guided:
            return ValueError("a request with cond_scale above 1 needs an engine made with guided=True.")
        if in_lockstep(options):
            return ValueError(
                "the engine serves greedy decoding, sampling and the standard beam search; for speculative decoding or "
                "the reference's search call decode()."
            )
        return None
