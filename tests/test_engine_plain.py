"""The engine against the plain search: lists over the modules' logits, every option, whatever is beside them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from engine_models import VOCABULARY, alone, engine_of, sources, tiny_model
from plain_decoding import all_logits, plain_alignment, plain_coverage
from plain_selection import slow_beam_search, slow_sample
from torch import Tensor

from spear_fast import DecodingOptions
from spear_fast.decoding.options import EARLY_STOPPING, new_seed
from spear_fast.decoding.packed import linear


def random_options(seed: int) -> DecodingOptions:
    """Any options that the engine serves; about half of each left as they are."""
    draw = random.Random(seed)

    def maybe(name, *values):
        return {} if draw.random() < 0.5 else {name: draw.choice(values)}

    length = draw.randint(2, 9)
    found = {"max_length": length, **maybe("min_length", 1, length - 1), **maybe("cond_scale", 1.3, 2.5)}
    found |= {**maybe("repetition_penalty", 0.8, 1.4), **maybe("no_repeat_ngram_size", 2, 3)}
    found |= {**maybe("coverage_penalty", 0.3, 3.0), **maybe("return_alignment", True)}
    found |= maybe("prefix", (3,), (7, 7)) if length > 3 else {}
    method = draw.choice(["beam", "beam", "greedy", "sample"])
    if method != "greedy":
        found |= maybe("temperature", 0.6, 1.7)
    if method == "beam":
        beams = draw.randint(1, 4)
        found |= {"beam_size": beams, "num_return_sequences": draw.randint(1, beams)}
        found |= {**maybe("length_penalty", 0.0, 0.6, 2.0), **maybe("patience", 0.5, 2.0)}
        found |= maybe("early_stopping", True, "never")
    if method == "sample":
        found |= {"generator": torch.Generator().manual_seed(seed), "num_return_sequences": draw.randint(1, 4)}
        found |= {**maybe("top_k", 1, 5), **maybe("top_p", 0.4, 0.9)}
    return DecodingOptions(method=method, **found)


class Plain:
    """One request decoded with lists."""

    def __init__(self, model, memory: Tensor, options: DecodingOptions) -> None:
        self.model, self.memory, self.options = model, memory[None], options
        self.mask = torch.ones(1, len(memory), dtype=torch.bool)
        self.known: dict[tuple[int, ...], list[float]] = {}
        self.settings = {
            name: getattr(options, name)
            for name in (
                "temperature", "length_penalty", "repetition_penalty", "patience", "max_length", "min_length",
                "no_repeat_ngram_size", "prefix",
            )
        }  # fmt: skip
        self.settings |= {"beam_size": options.hypotheses, "eos_id": VOCABULARY}
        self.settings |= {"top_k": options.top_k or 0, "top_p": options.top_p or 1.0}
        self.settings |= {"early_stopping": EARLY_STOPPING[options.early_stopping]}
        if options.method == "greedy":
            self.settings["temperature"] = 0.0

    def logits(self, tokens: tuple[int, ...]) -> list[float]:
        if tokens not in self.known:
            history = torch.tensor([tokens], dtype=torch.int64).view(1, -1)
            scale = self.options.cond_scale
            self.known[tokens] = all_logits(self.model, self.memory, self.mask, history, cond_scale=scale)[
                0, -1
            ].tolist()
        return self.known[tokens]

    def alignment(self, tokens: tuple[int, ...]) -> Tensor:
        return plain_alignment(self.model, self.memory, self.mask, torch.tensor([tokens]))[0]

    def results(self) -> list[tuple[tuple[int, ...], bool, float]]:
        """Tokens, whether they end, and score, best first."""
        options = self.options
        if options.method == "beam":
            found = [
                (each.tokens, each.finished, each.score) for each in slow_beam_search(self.logits, **self.settings)
            ]
        else:
            seed = new_seed(options)
            drawn = [slow_sample(self.logits, seed, beam, **self.settings) for beam in range(options.hypotheses)]
            found = [(tokens, finished, total / len(tokens)) for tokens, total, finished in drawn]
        if options.coverage_penalty:
            found = [
                (t, f, s + options.coverage_penalty * plain_coverage(self.alignment(t), self.mask[0]))
                for t, f, s in found
            ]
        return sorted(found, key=lambda each: -each[2])[: options.num_return_sequences]


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_request_is_served_as_the_plain_search_would(deterministic: bool) -> None:
    model = tiny_model(cond_drop_prob=0.1).double()
    asked = [(source, random_options(seed)) for seed, source in enumerate(sources(150, seed=21))]
    with engine_of(model, slots=7, beams=4, max_length=9, guided=True, deterministic=deterministic) as engine:
        served = {request.number: request.result() for request in engine.run(asked)}
    assert sorted(served) == list(range(150))
    seen = set()
    for number, result in served.items():
        options = random_options(number)
        source = asked[number][0]
        with torch.no_grad():
            memory = model.source_transformer(model.token_emb["speech"](source)[None])[0]
        plain = Plain(model, memory, options)
        wanted = plain.results()
        for i, (tokens, finished, score) in enumerate(wanted):
            assert tuple(result.tokens[0, i, : len(tokens)].tolist()) == tokens, options
            assert bool(result.finished[0, i]) == finished
            assert int(result.lengths[0, i]) == len(tokens) - finished
            assert math.isclose(float(result.scores[0, i]), score, rel_tol=1e-5, abs_tol=1e-5)
            seen.add((options.method, finished))
            if options.return_alignment:
                found = result.alignment[0, i, : len(tokens)].double()
                torch.testing.assert_close(found, plain.alignment(tokens), rtol=1e-5, atol=1e-6)
        # where fewer hypotheses came about than were asked for
        assert not result.scores[0, len(wanted) :].isfinite().any()
        assert (result.alignment is not None) == options.return_alignment
    assert len(seen) == 6


def spread_out(model):
    """The model with probabilities that are seldom near each other."""
    with torch.no_grad():
        model.token_emb["text"].weight.mul_(3)
    return model


def test_alone_and_beside_others_only_ties_differ(record_property, monkeypatch) -> None:
    """500 requests, each by itself and among others: whose tokens differ, and whether they are equally likely."""
    # torch's own matmuls, which round by the number of their rows
    monkeypatch.setattr(linear, "packs", lambda weight: False)
    model, count = spread_out(tiny_model()), 500
    rows = sources(count, seed=22)

    def options(i: int) -> DecodingOptions:
        if i % 5 == 4:
            return DecodingOptions(method="greedy", max_length=6 + i % 7)
        return DecodingOptions(beam_size=1 + i % 4, max_length=6 + i % 7, no_repeat_ngram_size=i % 3)

    with engine_of(model, slots=16, beams=4, max_length=12) as engine:
        asked = ((source, options(i)) for i, source in enumerate(rows))
        together = {request.number: request.result() for request in engine.run(asked)}
    lengths, ties, others, rounded = set(), [], [], 0
    with engine_of(model, slots=1, beams=4, max_length=12) as engine:
        for i, source in enumerate(rows):
            one, other = engine.submit(source, options(i)).result(), together[i]
            lengths.add(one.tokens.shape[-1])
            rounded += not torch.equal(one.scores, other.scores)
            if torch.equal(one.tokens, other.tokens) and torch.equal(one.finished, other.finished):
                torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-4)
                continue
            near = math.isclose(float(one.scores[0, 0]), float(other.scores[0, 0]), rel_tol=1e-5, abs_tol=1e-5)
            (ties if near else others).append(i)
    record_property("ties", len(ties))
    assert len(lengths) > 6
    assert rounded > count // 4, "neighbours change nothing here: the test shows nothing"
    assert not others
    assert len(ties) <= count // 100
    # the requests are not all one
    assert len({tuple(result.tokens[0, 0].tolist()) for result in together.values()}) > count // 4
    torch.testing.assert_close(alone(model, rows[0], options(0)).tokens, together[0].tokens)
