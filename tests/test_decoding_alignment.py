"""Where hypotheses looked, and what a coverage penalty makes of it, against a plain computation from the modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_models import engine_of, sources, tiny_model
from plain_decoding import (
    all_logits,
    assert_same_hypotheses,
    build_memory,
    build_model,
    hypotheses_of,
    log_probs_of,
    plain_alignment,
    plain_coverage,
    slow_beam_search,
)
from test_decoding_state import METHODS, assert_close, decoded
from test_engine import options_of, same

from spear_fast.decoding import Decoder, DecodingOptions, decode, source_alignment
from spear_fast.filters import top_k

HOW = {**METHODS, "drawn": dict(method="sample", num_return_sequences=3)}


def checked(model, memory, mask, result, kind: str) -> None:
    """The alignment of every hypothesis is the plain one, and 0 after its end and outside the mask."""
    assert result.alignment.dtype == torch.float32
    assert result.alignment.shape == (*result.tokens.shape, mask.shape[1])
    for row in range(len(mask)):
        for i in range(result.tokens.shape[1]):
            count = int(result.lengths[row, i] + result.finished[row, i])
            tokens = result.tokens[row, i, :count][None]
            wanted = plain_alignment(model, memory[row : row + 1], mask[row : row + 1], tokens, kind=kind)[0]
            found = result.alignment[row, i]
            torch.testing.assert_close(found[:count].double(), wanted.double(), rtol=1e-5, atol=1e-6)
            assert not found[count:].any()
            assert not found[:, ~mask[row]].any()


def holed(rows: int = 4, length: int = 7) -> torch.Tensor:
    """Masks with holes; one row without any source."""
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[1] = False
    return mask


@pytest.mark.parametrize("method", HOW)
@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_alignment_is_that_of_the_modules(method: str, cond_scale: float, kv_heads: int) -> None:
    model = build_model(kv_heads, target_kv_heads=kv_heads, target_depth=3, target_early_exit_layer=2)
    memory, mask = build_memory(model, 4)
    for own in (mask, holed()):
        options = dict(cond_scale=cond_scale, return_alignment=True, **HOW[method])
        if method == "drawn":
            options["generator"] = torch.Generator().manual_seed(0)
        result = decoded(model, memory, own, **options)
        checked(model, memory, own, result, "speech")
    assert 0 < float(result.alignment.sum(dim=-1).max()) < 1


@pytest.mark.parametrize("method", METHODS)
def test_alignment_is_that_of_the_reference_modules(method: str) -> None:
    from reference import build_reference

    theirs = build_reference(5, dtype=torch.float64, target_kv_heads=2, target_early_exit_layer=1)
    memory, mask = build_memory(build_model(5), 3)
    decoder = Decoder.from_modules(
        theirs.target_transformer,
        theirs.token_emb["speech"].weight,
        theirs.start_token["speech"],
        eos_id=17,
        pad_id=-1,
        early_exit=(1, theirs.to_early_exit_semantic_logits),
    )
    result = decode(decoder, memory, mask, DecodingOptions(max_length=9, return_alignment=True, **METHODS[method]))
    checked(theirs, memory, mask, result, "speech")


@pytest.mark.parametrize("method", HOW)
def test_alignment_changes_nothing_else_and_is_left_out_unless_asked_for(method: str, monkeypatch) -> None:
    model = build_model(2, target_early_exit_layer=1)
    memory, mask = build_memory(model, 3)
    seeded = {"generator": torch.Generator().manual_seed(0)} if method == "drawn" else {}
    with_it = decoded(model, memory, mask, return_alignment=True, **HOW[method], **seeded)
    monkeypatch.setattr(source_alignment, "attended", None)
    if seeded:
        seeded = {"generator": torch.Generator().manual_seed(0)}
    without = decoded(model, memory, mask, **HOW[method], **seeded)
    assert without.alignment is None
    assert_close(with_it, without)


def covered(model, memory, mask, row: int, cond_scale: float, penalty: float, count: int, **search):
    """The standard search's whole pool, ranked again by score and coverage."""
    pool = slow_beam_search(log_probs_of(model, memory, mask, row, cond_scale=cond_scale), 13, **search)
    ranked = []
    for hypothesis in pool:
        tokens = torch.tensor([hypothesis.tokens])
        where = plain_alignment(model, memory[row : row + 1], mask[row : row + 1], tokens)[0]
        ranked.append(replace(hypothesis, score=hypothesis.score + penalty * plain_coverage(where, mask[row])))
    return sorted(ranked, key=lambda hypothesis: -hypothesis.score)[:count]


@pytest.mark.parametrize("cond_scale", [1.0, 1.7])
@pytest.mark.parametrize("penalty", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_coverage_ranks_the_whole_pool_again(cond_scale: float, penalty: float, count: int) -> None:
    model = build_model(11)
    memory, _ = build_memory(model, 5)
    mask = holed(5)
    search = dict(beam_size=4, max_length=8, length_penalty=0.8, early_stopping=False)
    options = dict(cond_scale=cond_scale, num_return_sequences=count, **search)
    result = decoded(model, memory, mask, "text", coverage_penalty=penalty, **options)
    plain = decoded(model, memory, mask, "text", **options)
    assert result.alignment is None
    moved = 0
    for row in range(5):
        wanted = covered(model, memory, mask, row, cond_scale, penalty, count, **search)
        assert_same_hypotheses(hypotheses_of(result, row), wanted)
        moved += hypotheses_of(plain, row)[0].tokens != wanted[0].tokens
        alone = decoded(model, memory[row : row + 1], mask[row : row + 1], "text", coverage_penalty=penalty, **options)
        assert_same_hypotheses(hypotheses_of(alone, 0), wanted)
    assert moved or penalty < 1, "the penalty decides nothing"
    both = decoded(model, memory, mask, "text", coverage_penalty=penalty, return_alignment=True, **options)
    assert_close(both, result)
    checked(model, memory, mask, both, "text")


@pytest.mark.parametrize("how", ["greedy", "drawn"])
def test_coverage_of_greedy_and_of_draws(how: str) -> None:
    model = build_model(12)
    memory, mask = build_memory(model, 4)

    def run(**options):
        generator = {} if how == "greedy" else {"generator": torch.Generator().manual_seed(0)}
        return decoded(model, memory, mask, "text", max_length=8, **HOW[how], **generator, **options)

    plain, ranked = run(), run(coverage_penalty=2.0)
    for row in range(4):
        wanted = []
        for hypothesis in hypotheses_of(plain, row):
            where = plain_alignment(
                model, memory[row : row + 1], mask[row : row + 1], torch.tensor([hypothesis.tokens])
            )[0]
            wanted.append(replace(hypothesis, score=hypothesis.score + 2.0 * plain_coverage(where, mask[row])))
        assert_same_hypotheses(hypotheses_of(ranked, row), sorted(wanted, key=lambda each: -each.score))


def test_a_hypothesis_that_is_not_there_stays_last() -> None:
    """Fewer hypotheses than beams: a vocabulary of three, one token each."""
    model = build_model(13, num_text_token_ids=2)
    memory, mask = build_memory(model, 2)
    result = decoded(
        model, memory, mask, "text", max_length=1, beam_size=4, num_return_sequences=4, coverage_penalty=5.0,
        return_alignment=True,
    )  # fmt: skip
    assert result.scores[:, :3].isfinite().all()
    assert result.scores[:, 3].tolist() == [-torch.inf] * 2
    assert not result.alignment[:, 3].any()


def test_weights_are_taken_in_parts_and_nothing_unwritten_is_read(monkeypatch, nan_filled_empty) -> None:
    model = build_model(3)
    memory, mask = build_memory(model, 3)
    memory = memory.masked_fill(~mask[..., None], torch.nan)
    options = dict(beam_size=3, num_return_sequences=3, return_alignment=True, coverage_penalty=0.5)
    whole = decoded(model, memory, mask, **options)
    monkeypatch.setattr(source_alignment, "CHUNK", 70)
    parts = decoded(model, memory, mask, **options)
    assert whole.alignment.isfinite().all()
    torch.testing.assert_close(whole.alignment, parts.alignment)
    assert_close(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_alignment_of_model_dtypes(dtype: torch.dtype) -> None:
    exact, model = build_model(7), build_model(7, dtype=dtype)
    memory, mask = build_memory(exact, 3)
    result = decoded(model, memory.to(dtype), mask, return_alignment=True, beam_size=3)
    for row in range(3):
        count = int(result.lengths[row, 0] + result.finished[row, 0])
        tokens = result.tokens[row, :1, :count]
        wanted = plain_alignment(exact, memory[row : row + 1], mask[row : row + 1], tokens, kind="speech")[0]
        error = (result.alignment[row, 0, :count].double() - wanted).abs().max()
        size = float(all_logits(exact, memory[row : row + 1], mask[row : row + 1], tokens, kind="speech").abs().max())
        assert float(error) < 40 * size * torch.finfo(dtype).eps


def test_an_empty_batch_has_an_empty_alignment() -> None:
    model = build_model()
    memory, mask = build_memory(model, 2)
    result = decoded(model, memory[:0], mask[:0], beam_size=3, num_return_sequences=2, return_alignment=True)
    assert result.alignment.shape == (0, 2, 0, 7)


def test_alignment_and_coverage_in_company() -> None:
    """Of requests with options of their own, in an engine, to the bit where it is deterministic."""
    model = tiny_model()
    asked = [
        (source, options_of(i, return_alignment=i % 3 > 0, coverage_penalty=[0.0, 0.7][i % 2], cond_scale=1.0 + i % 2))
        for i, source in enumerate(sources(24, seed=9))
    ]

    def served(which, **settings):
        again = [(asked[i][0], replace(asked[i][1], generator=options_of(i).generator)) for i in which]
        with engine_of(model, slots=4, beams=4, max_length=12, guided=True, **settings) as engine:
            return {which[request.number]: request.result() for request in engine.run(again)}

    together, exact = served(range(24)), served(range(24), deterministic=True)
    for i in range(24):
        by_itself = served([i], deterministic=True)[i]
        same(together[i], by_itself)
        assert (together[i].alignment is not None) == (i % 3 > 0)
        assert torch.equal(exact[i].scores, by_itself.scores)
        if i % 3:
            torch.testing.assert_close(together[i].alignment, by_itself.alignment, rtol=1e-4, atol=1e-5)
            assert torch.equal(exact[i].alignment, by_itself.alignment)
            # tensors of inference mode could not be written to
            together[i].alignment[0] = 0


GENERATED = [
    dict(temperature=0.0, min_length=3),
    dict(temperature=0.0, no_repeat_ngram_size=2, repetition_penalty=1.3),
    dict(temperature=0.0, prefix=[3, 4]),
    dict(top_k=2, temperature=0.8),
    dict(top_p=0.7, num_return_sequences=2),
    dict(beam_search_decode=True, beam_mode="standard", patience=1.5, num_return_sequences=3, coverage_penalty=0.5),
    dict(beam_search_decode=True, beam_mode="standard", repetition_penalty=1.4, prefix=(5,), min_length=4),
]


@pytest.mark.parametrize("arguments", GENERATED, ids=str)
def test_generate_knows_the_options(arguments: dict) -> None:
    model = tiny_model()
    ids = torch.nn.utils.rnn.pad_sequence(sources(4), batch_first=True, padding_value=-1)
    seed = lambda: torch.Generator().manual_seed(4)  # noqa: E731
    result = model.generate(
        ids, source_type="speech", target_type="text", max_length=9, return_result=True, return_alignment=True,
        generator=seed(), **arguments,
    )  # fmt: skip
    own = {name: value for name, value in arguments.items() if name != "beam_search_decode"}
    own["prefix"] = tuple(own.get("prefix", ()))
    if not {"top_k", "top_p", "beam_search_decode"} & arguments.keys():
        own["filter_logits"] = top_k
    own["method"] = "beam" if "beam_search_decode" in arguments else "sample"
    with torch.no_grad():
        memory, mask, _ = model.encode(ids, source_type="speech")
    options = DecodingOptions(max_length=9, return_alignment=True, generator=seed(), **own)
    wanted = model.decode(memory, mask, target_type="text", options=options)
    same(result, wanted)
    torch.testing.assert_close(result.alignment, wanted.alignment, rtol=1e-4, atol=1e-5)


def test_what_generate_cannot_do_with_them() -> None:
    model, kwargs = tiny_model(), dict(source_type="speech", target_type="text", max_length=4)
    ids = sources(1)[0]
    for arguments, said in (
        (dict(return_alignment=True), "return_alignment needs return_result=True"),
        (dict(beam_search_decode=True, coverage_penalty=0.1), "coverage_penalty is not part of the reference's search"),
        (dict(coverage_penalty=-1.0), "coverage_penalty must be 0 or more, got -1.0"),
        (dict(return_alignment=1, return_result=True), "return_alignment must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(ids, **kwargs, **arguments)
    filtered = model.generate(ids, **kwargs, top_k=20, filter_logits_fn=top_k, filter_fn_kwargs=dict(k=1))
    assert filtered.tolist() == model.generate(ids, **kwargs, temperature=0.0).tolist()
