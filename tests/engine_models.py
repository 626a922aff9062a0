"""A small model with random weights, engines for it, and the plain search that they are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from spear_fast import DecodingOptions, DecodingResult, TextToSemantic
from spear_fast.decoding.config import EngineConfig
from spear_fast.decoding.engine import Engine
from spear_fast.decoding.packed.memory import KvDtype
from spear_fast.decoding.request import Request

VOCABULARY = 20


def tiny_model(dim: int = 32, **settings) -> TextToSemantic:
    torch.manual_seed(0)
    sizes = dict(source_depth=1, target_depth=2, heads=4, dim_head=8, target_kv_heads=2, cond_drop_prob=0.1)
    model = TextToSemantic(
        dim, num_text_token_ids=VOCABULARY, num_semantic_token_ids=VOCABULARY, **(sizes | settings)
    ).eval()
    for parameter in model.parameters():
        # norms and null keys that do something
        if parameter.requires_grad:
            parameter.data += 0.2 * (32 / dim) ** 0.5 * torch.randn_like(parameter)
    return model


def sources(count: int, seed: int = 0, longest: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def engine_of(
    model,
    *,
    slots: int,
    beams: int,
    max_length: int,
    max_source: int = 30,
    workers: int | None = None,
    kv_dtype: KvDtype = "exact",
    **settings,
) -> Engine:
    decoder = model.decoder("text")
    sizes = dict(slots=slots, beams=beams, max_length=max_length, max_source=max_source, workers=workers)
    sizes |= dict(kv_dtype=kv_dtype)
    config = EngineConfig.for_decoder(decoder, guided=settings.get("guided", False), **sizes)
    return Engine(model.encoder("speech"), decoder, config, **settings)


def assert_same_in_any_company(
    model,
    options_of: Callable[[int], DecodingOptions],
    *,
    requests: int,
    slots: int,
    by_itself: Sequence[int],
    **settings,
) -> None:
    """Fails unless a deterministic engine's results of requests have the same bits in any order, and alone in it.

    options_of: of the request of a number. by_itself: the requests that are served alone too.
    """
    asked = sources(requests, seed=8)
    order = list(range(requests))
    random.Random(0).shuffle(order)

    def served(which: Sequence[int]) -> dict[int, DecodingResult]:
        with engine_of(
            model, slots=slots, **({"beams": 4, "max_length": 12, "deterministic": True} | settings)
        ) as engine:
            # a fresh generator for each request: seeds are drawn when they are submitted
            finished = engine.run((asked[i], options_of(i)) for i in which)
            return {which[request.number]: request.result() for request in finished}

    together, shuffled = served(range(requests)), served(order)
    others = [(i, shuffled[i]) for i in range(requests)] + [(i, served([i])[i]) for i in by_itself]
    for i, other in others:
        for field in fields(DecodingResult):
            one, another = getattr(together[i], field.name), getattr(other, field.name)
            same = another is None if one is None else torch.equal(one, another)
            assert same, f"{field.name} of request {i}"


def ask(engine: Engine, source: torch.Tensor, *, callback=None, beam_size: int = 4, max_length: int = 12):
    return engine.submit(source, DecodingOptions(beam_size=beam_size, max_length=max_length), callback=callback)


def alone(model, source: torch.Tensor, options: DecodingOptions):
    """Returns what `decode` makes of one request by itself: without the engine's queue, neighbours and encoder."""
    with torch.no_grad():
        embedded = model.token_emb["speech"](source)[None]
        mask = torch.ones(1, len(source), dtype=torch.bool)
        return model.decode(model.source_transformer(embedded, mask), mask, target_type="text", options=options)


def requests_of(memories, options, seeds=None) -> list[Request]:
    """Returns encoded requests as a runner takes them, numbered from 0."""
    seeds = [0] * len(memories) if seeds is None else seeds
    each = zip(memories, options, seeds, strict=True)
    return [Request(number, memory, own, seed) for number, (memory, own, seed) in enumerate(each)]
