"""Tokens as they are final: no later step, and no other hypothesis, can change them any more.

Of one hypothesis every token is final once it is made. Of beam search those are that all hypotheses share which can
still win: the unfinished ones and those in the pool. Of several draws and of the reference's search all are at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.state import DecodeState
from spear_fast.ops.selection_params import SelectionMethod
from spear_fast.transfer import to_device, to_host

HISTORY_FIELDS = ("tokens", "parents")
ROW_FIELDS = ("scores", "pool_scores", "pool_beams", "pool_ends")


class TokenStream:
    """The final tokens of a request so far, without its end of sequence; filled by the engine, read by any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._ended = False
        self._wakers: list[Callable[[], None]] = []

    def put(self, first: int, tokens: Sequence[int]) -> None:
        """Appends tokens that begin at position `first`; what is there already must be the same.

        Raises RuntimeError where it is not: decoding began again and has gone another way.
        """
        known = self._tokens[first : first + len(tokens)]
        if list(tokens[: len(known)]) != known:
            raise RuntimeError(
                "decoding began again after tokens had been handed over, and other ones came; on devices where a "
                "matmul's bits depend on its rows, deterministic=True makes that impossible."
            )
        if len(tokens) == len(known):
            return
        with self._changed:
            self._tokens.extend(tokens[len(known) :])
        self._wake()

    def end(self) -> None:
        """Says that no more tokens come."""
        with self._changed:
            self._ended = True
        self._wake()

    def after(self, position: int) -> tuple[list[int], bool]:
        """Returns the tokens from a position on, and whether those are the last."""
        with self._changed:
            return self._tokens[position:], self._ended

    def has(self, position: int) -> bool:
        """Returns whether there are tokens from a position on, or no more come."""
        return len(self._tokens) > position or self._ended

    def wait(self, position: int) -> None:
        """Waits until there are tokens from a position on, or no more come."""
        with self._changed:
            while not self.has(position):
                self._changed.wait()

    def subscribe(self, waker: Callable[[], None]) -> None:
        """Calls `waker`, from any thread and with nothing locked, whenever something has changed."""
        with self._changed:
            self._wakers.append(waker)

    def unsubscribe(self, waker: Callable[[], None]) -> None:
        with self._changed:
            self._wakers.remove(waker)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for waker in wakers:
            waker()


@dataclass
class Streaming:
    """What a slot streams. sent: tokens handed over since its request has the slot."""

    stream: TokenStream
    options: DecodingOptions
    sent: int = 0


def send_final_tokens(
    state: DecodeState, streaming: Mapping[int, Streaming], eos_id: int | None
) -> list[tuple[list[int], BaseException]]:
    """Hands over what has become final in slots that are not done, by two waits for the device.

    streaming: by slot. Returns slots and what was wrong with them.
    """
    if not streaming:
        return []
    index = to_device(torch.tensor(list(streaming), device="cpu"), state.lengths.device)
    rows = to_host({name: getattr(state, name)[index] for name in (*ROW_FIELDS, "lengths", "done")})
    first, made = min(each.sent for each in streaming.values()), int(rows["lengths"].max())
    history = to_host({name: getattr(state, name)[index, first:made] for name in HISTORY_FIELDS})
    failures: list[tuple[list[int], BaseException]] = []
    for i, (slot_id, own) in enumerate(streaming.items()):
        # the result of what is done has the rest
        if rows["done"][i]:
            continue
        since = {name: history[name][i, own.sent - first :] for name in HISTORY_FIELDS}
        tokens = final_tokens(since, {name: rows[name][i] for name in (*ROW_FIELDS, "lengths")}, own.options, own.sent)
        if eos_id is not None and eos_id in tokens:
            tokens = tokens[: tokens.index(eos_id)]
        try:
            own.stream.put(own.sent, tokens)
        except RuntimeError as error:
            failures.append(([slot_id], error))
        own.sent += len(tokens)
    return failures


def final_tokens(
    history: dict[str, np.ndarray], row: dict[str, np.ndarray], options: DecodingOptions, sent: int
) -> list[int]:
    """Returns the tokens from position `sent` on that every hypothesis shares which can still win.

    history: `[T, K]` each, from position `sent` on. row: `[K]` each; see `DecodeState`.
    """
    count = options.hypotheses
    made = int(row["lengths"][:count].max())
    if options.kind != SelectionMethod.BEAM:
        # which of several draws is the best is known at their end, and what the reference's search returns when all
        # that it stops with stop
        alone = count == 1 and options.method != "beam"
        return history["tokens"][: made - sent, 0].tolist() if alone else []
    # unfinished hypotheses that are none yet have no score
    passing = {beam for beam in range(count) if row["scores"][beam] > -np.inf}
    shortest = made
    ended: dict[int, set[int]] = {}
    for rank in np.flatnonzero(row["pool_scores"][:count] > -np.inf).tolist():
        end = int(row["pool_ends"][rank])
        shortest = min(shortest, end)
        ended.setdefault(end, set()).add(int(row["pool_beams"][rank]))
    # the beams that the hypotheses pass at each step, from the last step back, until all pass the same one
    parents = history["parents"]
    for step in reversed(range(sent, made)):
        passing |= ended.get(step + 1, set())
        if len(passing) == 1 and step < shortest:
            return _path(history, step - sent, passing.pop())
        passing = {int(parents[step - sent, beam]) for beam in passing}
    return []


def _path(history: dict[str, np.ndarray], last: int, beam: int) -> list[int]:
    tokens = []
    for step in reversed(range(last + 1)):
        tokens.append(int(history["tokens"][step, beam]))
        beam = int(history["parents"][step, beam])
    return tokens[::-1]
