"""Selection written a second time, with lists, for one utterance alone: what the selection ops are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ops_selection_inputs import PLAIN

from spear_fast.ops.selection_params import EarlyStopping

Tokens = tuple[int, ...]
LogitsOf = Callable[[Tokens], Sequence[float]]


@dataclass(frozen=True)
class Ended:
    """A hypothesis: its tokens, the end of sequence included; whether there is one; its score."""

    tokens: Tokens
    finished: bool
    score: float


def log_softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    total = math.log(math.fsum(math.exp(value - top) for value in values))
    return [value - top - total for value in values]


def permitted(values: Sequence[float], history: Tokens, setting: dict) -> list[float]:
    """Values with penalties, -inf where a token must not come next."""
    count, size, penalty = len(history), setting["no_repeat_ngram_size"], setting["repetition_penalty"]
    if count < len(setting["prefix"]):
        return [0.0 if token == setting["prefix"][count] else -math.inf for token in range(len(values))]
    changed = list(values)
    for token in set(history):
        changed[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
    for i in range(size - 1, count) if size else ():
        if history[i - size + 1 : i] == history[count - size + 1 : count]:
            changed[history[i]] = -math.inf
    if count < setting["min_length"] and setting["eos_id"] >= 0:
        changed[setting["eos_id"]] = -math.inf
    return changed


def slow_beam_search(logits_of: LogitsOf, **settings) -> list[Ended]:
    """The search of `beam_step` over one utterance, best first."""
    setting = {**PLAIN, **settings}
    size, eos = setting["beam_size"], setting["eos_id"]

    def scored(total: float, length: int) -> float:
        return total / max(1, length - len(setting["prefix"])) ** setting["length_penalty"]

    running: list[tuple[Tokens, float]] = [((), 0.0)]
    pool: list[Ended] = []
    ended = 0
    for length in range(1, setting["max_length"] + 1):
        candidates = []
        for tokens, total in running:
            log_probs = log_softmax([value / setting["temperature"] for value in logits_of(tokens)])
            for token, value in enumerate(permitted(log_probs, tokens, setting)):
                if value > -math.inf:
                    candidates.append(((*tokens, token), total + value))
        candidates = sorted(candidates, key=lambda candidate: -candidate[1])[: 2 * size]
        new = [Ended(t, True, scored(s, length)) for t, s in candidates[:size] if t[-1] == eos]
        running = [(tokens, total) for tokens, total in candidates if tokens[-1] != eos][:size]
        if length == setting["max_length"]:
            new += [Ended(tokens, False, scored(total, length)) for tokens, total in running]
        ended += len(new)
        pool = sorted(pool + new, key=lambda hypothesis: -hypothesis.score)[:size]
        if not running:
            break
        if ended < max(1, math.floor(size * setting["patience"] + 0.5)):
            continue
        at = length
        if setting["early_stopping"] == EarlyStopping.NEVER and setting["length_penalty"] > 0:
            at = setting["max_length"]
        worst = pool[-1].score if len(pool) == size else -math.inf
        if setting["early_stopping"] == EarlyStopping.AT_ONCE or scored(running[0][1], at) <= worst:
            break
    return pool


def philox_uniform(seed: int, step: int, beam: int) -> float:
    """53 bits of Philox-4x32-10 at the counter (step, beam, 0, 0)."""
    counter, key = [step, beam, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        even, odd = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            odd >> 32 ^ counter[1] ^ key[0],
            odd & 0xFFFFFFFF,
            even >> 32 ^ counter[3] ^ key[1],
            even & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((counter[0] >> 5) * 2**26 + (counter[1] >> 6)) / 2**53


def slow_sample(logits_of: LogitsOf, seed: int, beam: int, **settings) -> tuple[Tokens, float, bool]:
    """Tokens, the sum of their log-probabilities without the prefix, and whether an end of sequence came."""
    setting = {**PLAIN, **settings}
    tokens: Tokens = ()
    total = 0.0
    while len(tokens) < setting["max_length"]:
        logits = list(logits_of(tokens))
        values = permitted(logits, tokens, setting)
        order = sorted(range(len(values)), key=lambda i: -values[i])
        if setting["temperature"] == 0:
            chosen = order[0]
        else:
            kept = order[: setting["top_k"] or len(order)]
            weights = {i: math.exp((values[i] - values[order[0]]) / setting["temperature"]) for i in kept}
            if setting["top_p"] < 1:
                share, nucleus = 0.0, []
                for i in kept:
                    if share < setting["top_p"] or not nucleus:
                        nucleus.append(i)
                    share += weights[i] / math.fsum(weights.values())
                weights = {i: weights[i] for i in nucleus}
            left = philox_uniform(seed, len(tokens), beam) * math.fsum(weights.values())
            for chosen in sorted(i for i in weights if weights[i] > 0):
                left -= weights[chosen]
                if left < 0:
                    break
        if len(tokens) >= len(setting["prefix"]):
            total += log_softmax(logits)[chosen]
        tokens = (*tokens, chosen)
        if chosen == setting["eos_id"]:
            return tokens, total, True
    return tokens, total, False
