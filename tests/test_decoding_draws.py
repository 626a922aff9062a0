"""Sampling and speculative decoding: exact distributions, drafts that change nothing, generators."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain_decoding import all_logits, build_memory, build_model
from torch import Tensor

from spear_fast.decoding import DecodingOptions, DecodingResult, decode
from spear_fast.decoding.speculative import LONGEST_NGRAM, repeated
from spear_fast.filters import top_k
from spear_fast.ops.reference.candidates import draw, restrict_to_top_k, restrict_to_top_p

VOCAB, EOS, LENGTH, DRAWS = 4, 3, 3, 3000


def exact_distribution(model, memory: Tensor, mask: Tensor, warp, cond_scale: float) -> dict[tuple[int, ...], float]:
    """Every sequence up to LENGTH or its end, with its probability when drawn from `warp(logits)` token by token."""
    tokens = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    rows = len(tokens)
    logits = all_logits(
        model, memory.expand(rows, -1, -1), mask.expand(rows, -1), tokens, kind="speech", cond_scale=cond_scale
    )
    chances = warp(logits[:, :-1]).softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    found = {}
    for row, chance in zip(tokens.tolist(), chances.tolist(), strict=True):
        count = row.index(EOS) + 1 if EOS in row else LENGTH
        product = 1.0
        for value in chance[:count]:
            product *= value
        found[tuple(row[:count])] = product
    assert abs(sum(found.values()) - 1) < 1e-9
    return found


def chi_square(result: DecodingResult, chances: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """Returns chi-squared of the drawn sequences and its degrees of freedom; rare ones are counted together."""
    counts = dict.fromkeys(chances, 0)
    for i in range(result.tokens.shape[1]):
        kept = (result.lengths + result.finished)[:, i].tolist()
        for row, count in zip(result.tokens[:, i].tolist(), kept, strict=True):
            counts[tuple(row[:count])] += 1
    total = sum(counts.values())
    assert not any(counts[key] for key, chance in chances.items() if chance == 0)
    pairs = [(chance * total, counts[key]) for key, chance in chances.items()]
    often = [pair for pair in pairs if pair[0] >= 8]
    rest = [pair for pair in pairs if 0 < pair[0] < 8]
    if rest:
        often.append((sum(pair[0] for pair in rest) + 1e-9, sum(pair[1] for pair in rest)))
    return sum((seen - wanted) ** 2 / wanted for wanted, seen in often), len(often) - 1


def assert_distributed(result: DecodingResult, chances: dict[tuple[int, ...], float]) -> None:
    statistic, freedom = chi_square(result, chances)
    assert freedom >= 3
    # Wilson and Hilferty: beyond 4 standard deviations once in 30,000
    limit = freedom * (1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit, f"chi-squared {statistic:.1f} with {freedom} degrees of freedom, at most {limit:.1f}"


WARPS = {
    "plain": (dict(), lambda logits: logits),
    "warm": (dict(temperature=2.0), lambda logits: logits / 2),
    "top_k": (dict(top_k=2), lambda logits: restrict_to_top_k(logits, 2)),
    "top_p": (dict(top_p=0.8, temperature=1.5), lambda logits: restrict_to_top_p(logits / 1.5, 0.8, logits / 1.5)),
    "filter": (dict(filter_logits=lambda logits: top_k(logits, k=3)), lambda logits: top_k(logits, k=3)),
}


@pytest.mark.parametrize(("warp", "cond_scale"), [("plain", 1.7), *((warp, 1.0) for warp in WARPS)])
@pytest.mark.parametrize(
    "method",
    [
        dict(method="sample"),
        dict(method="speculative", gamma=1),
        dict(method="speculative", gamma=3),
        dict(method="speculative", gamma=2, drafter="ngram"),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(method: dict, warp: str, cond_scale: float) -> None:
    model = build_model(3, num_semantic_token_ids=VOCAB - 1, target_early_exit_layer=1)
    memory, mask = build_memory(model, 1)
    options, transform = WARPS[warp]
    chances = exact_distribution(model, memory, mask, transform, cond_scale)
    options = DecodingOptions(
        max_length=LENGTH, cond_scale=cond_scale, generator=torch.Generator().manual_seed(5), **method, **options
    )
    result = decode(model.decoder("speech"), memory.expand(DRAWS, -1, -1), mask.expand(DRAWS, -1), options)
    assert_distributed(result, chances)


def test_several_draws_for_each_row_are_independent() -> None:
    model = build_model(3, num_semantic_token_ids=VOCAB - 1)
    memory, mask = build_memory(model, 1)
    chances = exact_distribution(model, memory, mask, lambda logits: logits, 1.0)
    options = DecodingOptions(
        method="sample", max_length=LENGTH, num_return_sequences=6, generator=torch.Generator().manual_seed(1)
    )
    result = decode(model.decoder("speech"), memory.expand(DRAWS // 6, -1, -1), mask.expand(DRAWS // 6, -1), options)
    assert_distributed(result, chances)
    assert (result.scores.diff(dim=-1) <= 0).all()


def test_the_distribution_test_notices_a_wrong_rule() -> None:
    # lenience below 1 accepts too often, and the test must see it
    model = build_model(3, num_semantic_token_ids=VOCAB - 1, target_early_exit_layer=1)
    memory, mask = build_memory(model, 1)
    chances = exact_distribution(model, memory, mask, lambda logits: logits, 1.0)
    options = DecodingOptions(
        method="speculative", lenience=0.5, max_length=LENGTH, generator=torch.Generator().manual_seed(5)
    )
    result = decode(model.decoder("speech"), memory.expand(DRAWS, -1, -1), mask.expand(DRAWS, -1), options)
    with pytest.raises(AssertionError, match="chi-squared"):
        assert_distributed(result, chances)


@pytest.mark.parametrize("depth", [1, 2, 3, None], ids=lambda depth: f"exit{depth}" if depth else "ngram")
@pytest.mark.parametrize("gamma", [1, 3, 8])
@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_drafts_at_temperature_zero_are_greedy_decoding(depth: int | None, gamma: int, cond_scale: float) -> None:
    drafter = "ngram" if depth is None else "early_exit"
    for seed in range(2):
        model = build_model(seed, target_depth=3, target_early_exit_layer=depth)
        memory, mask = build_memory(model, 4, seed=seed)
        options = dict(max_length=17, cond_scale=cond_scale, min_length=3)
        greedy = decode(model.decoder("speech"), memory, mask, DecodingOptions(method="greedy", **options))
        drafted = decode(
            model.decoder("speech"),
            memory,
            mask,
            DecodingOptions(method="speculative", temperature=0.0, gamma=gamma, drafter=drafter, **options),
        )
        assert drafted.tokens.tolist() == greedy.tokens.tolist()
        assert drafted.finished.tolist() == greedy.finished.tolist()
        torch.testing.assert_close(drafted.token_logprobs, greedy.token_logprobs)


def test_one_candidate_is_greedy_whatever_is_drawn() -> None:
    model = build_model(1, target_early_exit_layer=1)
    memory, mask = build_memory(model, 4)
    greedy = decode(model.decoder("speech"), memory, mask, DecodingOptions(method="greedy", max_length=14))
    for method in ("sample", "speculative"):
        for options in (dict(top_k=1), dict(top_p=1e-6), dict(filter_logits=lambda logits: top_k(logits, k=1))):
            found = decode(
                model.decoder("speech"), memory, mask, DecodingOptions(method=method, max_length=14, **options)
            )
            assert found.tokens.tolist() == greedy.tokens.tolist()


def plainly_repeated(tokens: list[int], count: int) -> list[int]:
    """Returns what followed the last tokens at their latest longest match, over and over."""
    last, best = len(tokens) - 1, (0, 0)
    for position in range(last):
        matched = 0
        while matched < min(LONGEST_NGRAM, position + 1) and tokens[position - matched] == tokens[last - matched]:
            matched += 1
        best = max(best, (matched, position))
    since = tokens[best[1] + 1 :]
    return [since[i % len(since)] for i in range(count)]


def test_ngrams_are_the_latest_longest_matches() -> None:
    generator, longest = torch.Generator().manual_seed(0), 0
    for size in range(2, 40):
        vocabulary = 2 + size % 4
        rows = torch.randint(vocabulary, (9, 40), generator=generator, dtype=torch.int32)
        # what stands after a row's length is never looked at
        rows[:, size:] = rows[:, :1]
        found = repeated(rows, torch.full((9,), size), 7)
        for row, drafts in zip(rows[:, :size].tolist(), found.tolist(), strict=True):
            wanted = plainly_repeated(row, 7)
            assert drafts == wanted
            longest = max(longest, len(set(wanted)))
    assert longest > 2
    # rows of their own lengths, one with a single token and one with none
    found = repeated(rows, torch.tensor([0, 1, *range(2, 9)]), 3)
    assert found[1].tolist() == [rows[1, 0]] * 3
    assert found[4].tolist() == plainly_repeated(rows[4, :4].tolist(), 3)


def test_what_repeats_itself_takes_few_rounds() -> None:
    """A decoder that goes round in a circle: once a period is known, every draft is right."""
    model = build_model(2, target_depth=1)
    memory, mask = build_memory(model, 1)
    wanted = [1, 2, 4] * 8
    allowed = iter(())

    def circle(logits: Tensor) -> Tensor:
        # rows of this one request in the order of positions, after the tokens that are there already
        nonlocal allowed
        made = next(allowed)
        forced = torch.full_like(logits, -torch.inf)
        for i in range(len(logits)):
            forced[i, wanted[(made + i) % len(wanted)]] = 0.0
        return forced

    from spear_fast.decoding import speculative

    made, real = [0], speculative._commit

    def committed(*arguments):
        real(*arguments)
        made.append(int(arguments[1].lengths[0, 0]))

    def lengths():
        while True:
            yield made[-1]

    allowed = lengths()
    speculative._commit = committed
    try:
        options = DecodingOptions(method="speculative", drafter="ngram", gamma=5, max_length=24, filter_logits=circle)
        result = decode(model.decoder("speech"), memory, mask, options)
    finally:
        speculative._commit = real
    assert result.tokens[0, 0].tolist() == wanted
    # a token a round until the circle has closed, then six
    assert len(made) - 1 <= 4 + -(-20 // 6)


def test_a_head_that_is_the_whole_decoder_is_always_right() -> None:
    """With drafts from the target's own distribution every one of them is accepted."""
    model = build_model(2, target_depth=2, target_early_exit_layer=2)
    residual, norm, linear = model.to_early_exit_semantic_logits
    with torch.no_grad():
        residual.fn[4].weight.zero_()
        residual.fn[4].bias.zero_()
        norm.gamma.copy_(model.target_transformer.final_norm.gamma)
        linear.weight.copy_(model.token_emb["speech"].weight)
    memory, mask = build_memory(model, 3)
    from spear_fast.decoding import methods

    rounds = []
    real = methods.speculate

    def counted(*arguments):
        rounds.append(1)
        real(*arguments)

    methods.speculate = counted
    try:
        result = decode(
            model.decoder("speech"),
            memory,
            mask,
            DecodingOptions(method="speculative", gamma=4, max_length=20, min_length=19),
        )
    finally:
        methods.speculate = real
    assert result.tokens.shape[-1] == 20
    assert len(rounds) == 4


@pytest.mark.parametrize("method", ["sample", "speculative"])
def test_generators_repeat_draws(method: str) -> None:
    model = build_model(4, target_early_exit_layer=1)
    memory, mask = build_memory(model, 3)

    def drawn(seed: int) -> list:
        options = DecodingOptions(method=method, max_length=15, generator=torch.Generator().manual_seed(seed))
        return decode(model.decoder("speech"), memory, mask, options).tokens.tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    torch.manual_seed(0)
    drawn(1)
    assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(0)).item()


def test_draw_never_takes_what_has_no_weight() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.33333, 0.33334, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [1, 1, 3, 3, 3]
    # a total that rounds to below its parts
    tiny = torch.tensor([[0.1] * 7 + [0.0]])
    assert draw(tiny, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [6]


def test_filters() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).log()
    assert restrict_to_top_k(logits, 2).isfinite().tolist() == [[False, True, True, False]]
    assert restrict_to_top_k(logits, 9).isfinite().tolist() == [[True, True, True, False]]
    for share, kept in ((0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.84, 3), (1.0, 4)):
        assert int(restrict_to_top_p(logits, share, torch.zeros(1, 4)).isfinite().sum()) in (kept, min(kept, 3))


def test_a_verification_is_one_call_of_each_op(monkeypatch) -> None:
    """Layers above the early exit see all drafted positions at once, those below one at a time."""
    from spear_fast import ops

    seen = []
    real = ops.decode_self_attention

    def counted(query, *others):
        seen.append(query.shape[2])
        return real(query, *others)

    monkeypatch.setattr(ops, "decode_self_attention", counted)
    model = build_model(1, target_depth=3, target_early_exit_layer=1)
    memory, mask = build_memory(model, 2)
    options = DecodingOptions(method="speculative", gamma=3, max_length=4, min_length=3)
    decode(model.decoder("speech"), memory, mask, options)
    one_round = [1] * 4 + [4] * 2
    assert seen[: len(one_round)] == one_round
    assert len(seen) % len(one_round) == 0
