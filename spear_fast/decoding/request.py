"""A request: the future that its caller holds, and what decoding needs to know of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from spear_fast.decoding.config import EngineConfig
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.encoder import Encoder
from spear_fast.decoding.result import DecodingResult
from spear_fast.decoding.streaming import TokenStream


class Driver(Protocol):
    """What makes a request's steps."""

    def run_until(self, reached: Callable[[], bool], timeout: float | None) -> float | None:
        """Makes steps until `reached` returns true or the seconds are over; returns what is left of them to wait."""

    def cancel(self, request: Request) -> bool:
        """Takes the request back; returns whether there was something to take back."""

    def start(self) -> Any:
        """Lets a thread make the steps, where none does."""


class StopGroup:
    """Requests of the reference's search that stop together, as the rows of its batch do: with the slowest of them.

    size: how many they are. Each notes at which step all of its hypotheses held an end.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._requests: list[Request] = []
        self._ends: dict[int, int] = {}

    def add(self, request: Request) -> None:
        """Takes a request in, when it is submitted."""
        self._requests.append(request)

    def note(self, request: Request, step: int) -> None:
        """Notes the step from which on a request could stop, or the last one that it may make."""
        self._ends[request.number] = step

    @property
    def stop(self) -> int | None:
        """The step at which all stop; None while that is open. Those that failed or were cancelled do not count."""
        if len(self._requests) < self._size:
            return None
        if not all(request.number in self._ends or request.done() for request in self._requests):
            return None
        return max(self._ends.values(), default=0)


class _Waiters(list):
    """`concurrent.futures.wait` and `as_completed` put themselves here: somebody must make the steps from then on."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._request.start_driver()


class Request(Future[DecodingResult]):
    """A future of the result of one request, a `DecodingResult` of one utterance, on the CPU.

    `await asyncio.wrap_future(request)`, `concurrent.futures.wait` and `add_done_callback` work too; they start the
    engine's thread where nobody makes its steps. An exception in a callback is logged and stops nothing.
    Submitted with `stream=True`, `for token in request` and `async for token in request` give its tokens as they are
    final, see `Engine.submit`; they raise what the request fails of.
    number: counts the requests of an engine. tag: what was passed to `submit`. options: how it is decoded.

    For decoding. source: ids `[n]` int64 on the host, or what an encoder made of them, `[n, dim]`. seed: of its draws.
    memory: `[n, dim]`, encoded, until it has a slot. group: what it stops with, in the reference's search. stream:
    where its tokens go, or None.
    """

    def __init__(
        self,
        number: int,
        source: Tensor,
        options: DecodingOptions,
        seed: int = 0,
        *,
        driver: Driver | None = None,
        tag: Any = None,
        group: StopGroup | None = None,
        stream: bool = False,
    ) -> None:
        super().__init__()
        self.number, self.tag, self.options = number, tag, options
        self.source, self.seed, self.group = source, seed, group
        self.memory: Tensor | None = source if is_memory(source) else None
        self.stream = TokenStream() if stream else None
        self._driver = driver
        self._completed = False
        self._completing = threading.Lock()
        self._waiters: list[Any] = _Waiters(self)

    def begin_again(self) -> None:
        """Forgets how far decoding has come."""
        self.memory = self.source if is_memory(self.source) else None

    @property
    def length(self) -> int:
        """Source positions."""
        return len(self.source)

    def cancel(self) -> bool:
        """Takes the request back, also when it is being decoded: its slot is free from the next step on.

        Returns whether there was something to take back.
        """
        return self._driver is not None and self._driver.cancel(self)

    def result(self, timeout: float | None = None) -> DecodingResult:
        """Returns the result, making the engine's steps where no thread does; raises what the request failed of.

        timeout: seconds after which TimeoutError is raised; looked at between steps where they are made here.
        """
        return super().result(self._remaining(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Returns what the request failed of, or None; see `result`."""
        return super().exception(self._remaining(timeout))

    def _remaining(self, timeout: float | None) -> float | None:
        return timeout if self._driver is None or self.done() else self._driver.run_until(self.done, timeout)

    def __iter__(self) -> Iterator[int]:
        """Yields the tokens as they are final, making the engine's steps where no thread does; see `Engine.submit`."""
        stream, position = self._own_stream(), 0
        while True:
            tokens, ended = stream.after(position)
            yield from tokens
            position += len(tokens)
            if ended:
                break
            if self._driver is not None and not tokens:
                self._driver.run_until(partial(stream.has, position), None)
                stream.wait(position)
        self.result()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yields the tokens as they are final; starts the engine's thread where nobody makes its steps."""
        stream, position = self._own_stream(), 0
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # a loop that has ended waits for nothing
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        stream.subscribe(wake)
        try:
            self.start_driver()
            while True:
                changed.clear()
                tokens, ended = stream.after(position)
                for token in tokens:
                    yield token
                position += len(tokens)
                if ended:
                    break
                await changed.wait()
        finally:
            stream.unsubscribe(wake)
        self.result()

    def _own_stream(self) -> TokenStream:
        if self.stream is None:
            raise TypeError("the tokens of a request come one by one only where it is submitted with stream=True.")
        return self.stream

    def add_done_callback(self, callback: Any) -> None:
        """Calls `callback(request)` when it is done, from the thread that makes the steps; starts one at need."""
        super().add_done_callback(callback)
        self.start_driver()

    def call_when_done(self, callback: Any) -> None:
        """Does as `add_done_callback`, for callers that make the steps themselves."""
        super().add_done_callback(callback)

    def start_driver(self) -> None:
        """Sees to it that somebody makes the steps."""
        if self._driver is not None and not self.done():
            self._driver.start()

    def complete(self, outcome: DecodingResult | BaseException) -> None:
        """Hands over the result or what the request failed of; a request that is done already stays as it is."""
        with self._completing:
            if self._completed:
                return
            self._completed = True
        if self.stream is not None and isinstance(outcome, DecodingResult):
            try:
                self.stream.put(0, outcome.tokens[0, 0, : int(outcome.lengths[0, 0])].tolist())
            except RuntimeError as error:
                outcome = error
        # callbacks run in here and may complete other requests
        if isinstance(outcome, CancelledError):
            super().cancel()
            self.set_running_or_notify_cancel()
        elif isinstance(outcome, BaseException):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)
        if self.stream is not None:
            self.stream.end()


def is_memory(source: Any) -> bool:
    """Returns whether a source is encoded already."""
    return isinstance(source, Tensor) and source.ndim == 2 and source.is_floating_point()


def own_source(source: Any) -> Any:
    """Returns a copy of what a caller gave: ids as int64 on the host, a memory where it is; other things as they are.

    The caller may refill its buffer at once.
    """
    if not isinstance(source, Tensor) or source.layout != torch.strided or source.device.type == "meta":
        return source
    if source.is_floating_point() or source.is_complex() or source.dtype == torch.bool:
        return source.detach().clone()
    return source.detach().to("cpu", torch.int64, copy=True)


def refusal(
    source: Any, options: Any, *, encoder: Encoder | None, decoder: Decoder, config: EngineConfig, guided: bool
) -> Exception | None:
    """Returns why an engine of these sizes cannot serve a request, or None.

    source: as `own_source` returns it. guided: whether the engine decodes without the source too.
    """
    if not isinstance(options, DecodingOptions):
        return TypeError(f"options must be DecodingOptions, got {type(options).__name__}.")
    wrong = _memory_refusal(source, decoder, config) if is_memory(source) else _ids_refusal(source, encoder, config)
    return wrong or _options_refusal(options, decoder, config, guided)


def _memory_refusal(memory: Tensor, decoder: Decoder, config: EngineConfig) -> Exception | None:
    if memory.shape[1] != decoder.dim or memory.device != decoder.device or memory.layout != torch.strided:
        return ValueError(
            f"a memory must be [n, {decoder.dim}] on {decoder.device}, got {list(memory.shape)} on {memory.device}; is "
            "it another model's?"
        )
    if len(memory) > config.max_source:
        return ValueError(
            f"a memory may have up to {config.max_source} positions, the engine's max_source, got {len(memory)}; make "
            "an engine with a larger one."
        )
    return None


def _ids_refusal(source: Any, encoder: Encoder | None, config: EngineConfig) -> Exception | None:
    is_ids = isinstance(source, Tensor) and source.layout == torch.strided and source.device.type == "cpu"
    if not is_ids or source.ndim != 1 or source.dtype != torch.int64:
        got = f"{source.dtype} {list(source.shape)} on {source.device}" if isinstance(source, Tensor) else type(source)
        return ValueError(f"source must be a tensor of integer ids [n], or a memory [n, dim], got {got}.")
    if encoder is None:
        return ValueError("ids need an engine with an encoder, and this one has none; pass an encoded memory [n, dim].")
    if not 0 < len(source) <= config.max_source:
        return ValueError(
            f"source must have 1 to {config.max_source} ids, the engine's max_source, got {len(source)}; split it or "
            "make an engine with a larger one."
        )
    low, high = (int(bound) for bound in torch.aminmax(source))
    vocabulary = encoder.embedding.shape[0]
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        return ValueError(f"source ids must lie in 0..{vocabulary - 1}, got {wrong}; is it another model's?")
    return None


def _options_refusal(
    options: DecodingOptions, decoder: Decoder, config: EngineConfig, guided: bool
) -> Exception | None:
    if options.hypotheses > config.beams:
        return ValueError(
            f"a request may have up to {config.beams} hypotheses, the engine's beams, got {options.hypotheses}; make "
            "an engine with more."
        )
    if options.max_length > config.max_length:
        return ValueError(
            f"max_length may be up to {config.max_length}, the engine's, got {options.max_length}; make an engine "
            "with a larger one."
        )
    if any(token >= decoder.vocab_size for token in options.prefix):
        return ValueError(
            f"prefix must hold ids in 0..{decoder.vocab_size - 1}, got {max(options.prefix)}; is it another model's?"
        )
    if options.guided and not guided:
        return ValueError("a request with cond_scale above 1 needs an engine made with guided=True.")
    if options.method == "speculative" and options.drafter == "early_exit" and decoder.early_exit is None:
        return ValueError(
            "speculative decoding drafts with an early-exit head, and this model has none; use drafter='ngram', or "
            "build and train it with target_early_exit_layer."
        )
    return None
