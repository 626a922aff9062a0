"""The ticket of a request: what the caller holds while the engine works."""

from __future__ import annotations

import threading
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
        self._settled = False
        self._settling = threading.Lock()

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

    def settle(self, outcome: DecodingResult | BaseException) -> None:
        """Hands over the result or what the request failed of; a ticket that is settled already stays as it is."""
        with self._settling:
            if self._settled:
                return
            self._settled = True
        # callbacks run in here and may settle other tickets
        if isinstance(outcome, CancelledError):
            super().cancel()
            self.set_running_or_notify_cancel()
        elif isinstance(outcome, BaseException):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)
