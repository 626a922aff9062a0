"""The engine: requests in, results out as each is finished, many utterances in flight.

A step works on all utterances in flight. One that is finished leaves at once, and a waiting one takes its slot, so that
a row which goes on and on holds up nobody.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any

from torch import Tensor

from spear_fast.decoding.config import EngineConfig
from spear_fast.decoding.options import DecodingOptions, new_seed
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.encoder import Encoder
from spear_fast.decoding.request import Request, StopGroup, own_source, refusal
from spear_fast.decoding.runner import Outcome
from spear_fast.decoding.scheduler import Scheduler
from spear_fast.ops.selection_params import SelectionMethod

log = logging.getLogger(__name__)


class Engine:
    """Decodes requests with one model, up to `config.slots` at a time.

    encoder, decoder: packed weights of the model's two sides; `TextToSemantic.engine` gives both. Without an encoder it
        takes sources that are encoded already.
    config: sizes of the buffers, see `EngineConfig`. encode_tokens: most source tokens that are encoded together, by
        default as many as the kind of device likes.
    guided: whether requests may have a `cond_scale` above 1; each step then also decodes without the source.
    deterministic: batch-invariant: the same bits for a request whatever is decoded beside it and in any order, by an
        engine of the same sizes. A CPU encodes sources one by one, a GPU in groups filled up to `encode_tokens`. Where
        the bits of a matmul depend on its number of rows, as on GPUs, every step works on all slots, free ones too.

    Use it as a context manager, or call `close`. One thread at a time makes steps: whoever asks for results, or, after
    `start`, a thread of the engine's own. Every request is completed, by `close` at the latest.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        decoder: Decoder,
        config: EngineConfig,
        *,
        encode_tokens: int | None = None,
        guided: bool = False,
        deterministic: bool = False,
    ) -> None:
        # guards the queues; steps are made outside of it, and requests completed outside of both locks
        self._lock = threading.RLock()
        self._stepping = threading.Lock()
        # who is inside a step, and would wait for itself
        self._stepper: int | None = None
        self._changed = threading.Condition(self._lock)
        self._scheduler = Scheduler(
            encoder,
            decoder,
            config,
            encode_tokens=encode_tokens,
            guided=guided,
            deterministic=deterministic,
            lock=self._lock,
        )
        self._numbers = itertools.count()
        # by number, until they are completed
        self._open: dict[int, Request] = {}
        self._steps = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def config(self) -> EngineConfig:
        """The sizes of the buffers; fewer slots once memory has run out."""
        return self._scheduler.config

    @property
    def plan(self) -> EngineConfig:
        """Deprecated: the name of `config` in the last release."""
        warnings.warn("Engine.plan is now Engine.config.", DeprecationWarning, stacklevel=2)
        return self.config

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return self._scheduler.waiting

    @property
    def in_flight(self) -> int:
        """Requests that are being decoded."""
        return self._scheduler.in_flight

    def fits(self, encoder: Encoder | None, config: EngineConfig, guided: bool) -> bool:
        """Returns whether this engine can do the work of one with these sizes, and is not much larger."""
        own = self.config
        return (
            not self._closed
            and self._scheduler.encoder is encoder
            and self._scheduler.guided == guided
            and own.beams == config.beams
            and own.kv_dtype == config.kv_dtype
            and config.slots <= own.slots
            and config.max_length <= own.max_length
            and config.max_source <= own.max_source
            and own.bytes <= 4 * config.bytes
        )

    def submit(
        self,
        source: Tensor,
        options: DecodingOptions | None = None,
        *,
        callback: Callable[[Request], Any] | None = None,
        tag: Any = None,
        stop_group: StopGroup | None = None,
        stream: bool = False,
    ) -> Request:
        """Takes a request and returns its future at once. One that cannot be served fails alone, in its future.

        source: `[n]` integer ids of any type, an end-of-sequence included where the model wants one; or `[n, dim]`
        floating point, a memory as the encoder gives it, which is not encoded again. It is copied. options: by default
        beam search with the engine's beams. callback: called with the request when it is done. stop_group: what a
        request of the reference's search stops with, by default itself alone; as large as it says from the start.
        stream: whether `for token in request` and `async for token in request` give the tokens of the best hypothesis,
        int each, without the end of sequence, as soon as no later step can change them: of greedy decoding, one draw
        and speculative decoding at once, of beam search those on which all hypotheses agree that can still win; of
        several draws and of the reference's search all at the end. Whether it is done is then looked at every step.

        Raises RuntimeError when the engine is closed.
        """
        scheduler, config = self._scheduler, self.config
        if options is None:
            options = DecodingOptions(beam_size=config.beams, max_length=config.max_length)
        wrong: Exception | None = None
        try:
            source = own_source(source)
            wrong = refusal(
                source,
                options,
                encoder=scheduler.encoder,
                decoder=scheduler.decoder,
                config=config,
                guided=scheduler.guided,
            )
        except Exception as error:
            # of what no check expected
            wrong = error
        seed = new_seed(options) if wrong is None else 0
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed and takes no more requests; make another one.")
            if wrong is None and options.kind == SelectionMethod.REFERENCE and stop_group is None:
                stop_group = StopGroup(1)
            request = Request(
                next(self._numbers), source, options, seed, driver=self, tag=tag,
                group=stop_group if wrong is None else None, stream=stream,
            )  # fmt: skip
            if stop_group is not None:
                stop_group.add(request)
            self._open[request.number] = request
            if callback is not None:
                request.call_when_done(callback)
            if wrong is None:
                scheduler.add(request)
                self._changed.notify_all()
        if wrong is not None:
            self._complete([(request, wrong)])
        return request

    def run(
        self,
        sources: Iterable[Tensor | tuple[Tensor, DecodingOptions]],
        options: DecodingOptions | None = None,
        *,
        ahead: int | None = None,
    ) -> Iterator[Request]:
        """Yields the requests of all sources as they are done; `request.number` counts the engine's in order.

        sources: as `submit` takes them, alone or with options of their own; taken as slots come free.
        ahead: how many wait at most; more of them make batches of more equal lengths.
        """
        ahead = 8 * self.config.slots if ahead is None else max(1, ahead)
        done: deque[Request] = deque()
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
            if self._makes_steps():
                self._step()
                continue
            with self._changed:
                # whoever completes a request, or takes one from the queue, notifies
                while not done and self._open and (exhausted or self._closed or self.waiting >= ahead):
                    self._changed.wait()

    def step(self) -> None:
        """Gives free slots away, makes a step of all that is in flight, and hands over what is done.

        Where the engine's own thread makes the steps, waits for one.
        """
        if self._makes_steps():
            self._step()
            return
        with self._changed:
            before = self._steps
            while self._steps == before and not self._closed and (self.waiting or self.in_flight):
                self._changed.wait()

    def run_until(self, reached: Callable[[], bool], timeout: float | None = None) -> float | None:
        """Makes steps until `reached` returns true or `timeout` seconds are over; none where the engine's thread does.

        Returns what is left of the seconds. Raises RuntimeError within a step, which would wait for itself.
        """
        if self._stepper == threading.get_ident():
            raise RuntimeError("a function that a step calls asks for a result, and would wait for itself for ever.")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not reached() and self._makes_steps() and not self._closed:
            if deadline is not None and time.monotonic() >= deadline:
                return 0
            self._step()
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def start(self) -> Engine:
        """Lets a thread of its own make the steps, so that requests are done without anybody asking; for servers."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, name="spear_fast engine", daemon=True)
                self._thread.start()
        return self

    def cancel(self, request: Request) -> bool:
        """Takes a request back; see `Request.cancel`."""
        with self._lock:
            if request.done():
                return False
            self._scheduler.remove(request)
        self._complete([(request, CancelledError())])
        return request.cancelled()

    def close(self) -> None:
        """Takes back all that waits or is in flight, and frees the buffers; every request is completed then."""
        if self._stepper == threading.get_ident():
            raise RuntimeError("a function that a step calls closes the engine, which would wait for itself for ever.")
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping, self._lock:
            self._scheduler.evict()
            requests = list(self._open.values())
            for request in requests:
                self._scheduler.remove(request)
        self._complete([(request, CancelledError()) for request in requests])

    def _makes_steps(self) -> bool:
        """Returns whether the calling thread makes the steps: no other does, or it is the engine's own."""
        return self._thread is None or self._thread is threading.current_thread()

    def _serve(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._closed or self.waiting or self.in_flight):
                        self._changed.wait()
                    if self._closed:
                        return
                self._step()
        # not even what no step should raise may leave requests that nobody completes
        except BaseException as error:
            log.exception("the engine's thread has ended")
            with self._lock:
                self._closed = True
                requests = list(self._open.values())
            ended = RuntimeError(f"the engine's thread has ended: {error!r}.")
            self._complete([(request, ended) for request in requests])

    def _step(self) -> None:
        try:
            with self._stepping:
                self._stepper = threading.get_ident()
                try:
                    outcomes = [] if self._closed else self._scheduler.step()
                finally:
                    self._stepper = None
            # a callback may ask for other results, submit, cancel or close
            interrupt = self._complete(outcomes)
        except BaseException:
            # wherever it came, nothing is lost: what is not completed begins again
            self._restore()
            raise
        if interrupt is None and self._thread is None:
            # came while a function of a caller's was being called, and is for whoever waits here
            interrupt = next(filter(None, (_interrupt(each) for _, each in outcomes)), None)
        if interrupt is not None:
            raise interrupt
        if self._open and not (self._closed or self.waiting or self.in_flight):
            self._restore()

    def _restore(self) -> None:
        """Lets every request that is not completed wait again, after an interrupt in the midst of a step."""
        with self._stepping, self._lock:
            self._scheduler.evict()
            for request in list(self._open.values()):
                self._scheduler.remove(request)
                if request.done():
                    del self._open[request.number]
                else:
                    request.begin_again()
                    self._scheduler.add(request)

    def _complete(self, outcomes: list[Outcome]) -> BaseException | None:
        """Hands over results and errors, all of them whatever a callback raises; returns an interrupt that came."""
        interrupt: BaseException | None = None
        for request, outcome in outcomes:
            try:
                request.complete(outcome)
            except KeyboardInterrupt as error:
                interrupt = error
            except BaseException:
                log.exception("a callback of request %d raised", request.number)
        with self._changed:
            for request, _ in outcomes:
                self._open.pop(request.number, None)
            self._steps += 1
            self._changed.notify_all()
        return interrupt


def _interrupt(outcome: Any) -> BaseException | None:
    """Returns the interrupt that a request failed of, or None."""
    cause = outcome.__cause__ if isinstance(outcome, BaseException) else None
    return cause if isinstance(cause, KeyboardInterrupt) else None
