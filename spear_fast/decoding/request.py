"""The ticket of a request: what the caller holds while the engine works."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from spear_fast.decoding.result import DecodingResult

if TYPE_CHECKING:
    from spear_fast.decoding.engine import Engine


class Ticket(Future[DecodingResult]):
    """A future of the result of one request, a `DecodingResult` of one utterance, on the CPU.

    `await asyncio.wrap_future(ticket)` waits for it in a coroutine. `add_done_callback` takes a callback; an exception
    in one is logged and stops nothing. number: counts the requests of an engine. tag: what was passed to `submit`.
    """

    def __init__(self, engine: Engine, number: int, tag: Any) -> None:
        super().__init__()
        self._engine = engine
        self.number = number
        self.tag = tag

    def cancel(self) -> bool:
        """Takes the request back, also when it is being decoded: its slot is free from the next step on.

        Returns whether there was something to take back.
        """
        return self._engine.withdraw(self)

    def result(self, timeout: float | None = None) -> DecodingResult:
        """Returns the result, making the engine's steps where no thread does; raises what the request failed of."""
        self._engine.drive(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Returns what the request failed of, or None; see `result`."""
        self._engine.drive(self)
        return super().exception(timeout)

    def resolve(self, result: DecodingResult) -> None:
        """Hands over the result; a ticket that was taken back stays so."""
        if not self.done():
            self.set_result(result)

    def fail(self, error: BaseException) -> None:
        if self.done():
            return
        if isinstance(error, CancelledError):
            super().cancel()
            self.set_running_or_notify_cancel()
            return
        self.set_exception(error)
