"""Generation's benchmark: nothing is timed that gives other tokens, everybody takes the same steps, work is counted."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

import pytest
import torch

from benchmarks import generate, rows, t5, variants
from benchmarks.cases import CASES, CTRANSLATE2, ENGINE, OURS, STANDARD, Case
from benchmarks.machine import CPU, commit, processor
from benchmarks.variants import Generation
from spear_fast import cli
from spear_fast.ops import providers


def test_generation_counts_what_each_piece_of_work_takes():
    """One layer, one number of everything: what a person counts by hand."""
    case = Case("", dim=6, source_layers=1, target_layers=1, heads=1, kv_heads=1, head_dim=1, vocabulary=1, batch=1,
                source=2, tokens=1, beam=1)  # fmt: skip
    inner = 16
    encoder = 4 * 6 + 3 * 6 * inner
    decoder = 6 * 3 + 3 * 6 + 3 * 6 * inner + 6
    attended = 4 * 2 * 2 + 4 * (2 + 1) + 4 * 1
    assert case.flops() == 2 * 2 * encoder + 4 * 2 * 6 + 2 * decoder + attended
    assert case.bytes() == 4 * (decoder + 3 * 2 + 2)
    mixed = CASES["b256-mixed"]
    lengths, texts = mixed.drawn()
    assert 50 <= min(lengths) < 60
    assert 490 < max(lengths) <= 500
    assert (min(texts), max(texts)) == (10, 120)


def test_generation_is_measured_beside_the_reference(tmp_path):
    assert (
        cli.main(["bench", "generate", "--set", "tiny", "--cases", "tiny", "--rounds", "1", "--out", str(tmp_path)])
        == 0
    )
    (file,) = tmp_path.glob("*.jsonl")
    found = {row["variant"]: row for row in rows.read(file)}
    assert set(found) == {"reference", "spear_fast", "spear_fast standard", "spear_fast engine"}
    assert found["reference"]["times"]["reference"]["p50"] == 1
    for row in found.values():
        assert row["equal_tokens"] == 1
        assert row["versions"] == {"spear-tts-pytorch": metadata.version("spear-tts-pytorch")}
        assert (row["processor"], row["commit"], row["threads"]) == (processor(), commit(), torch.get_num_threads())


@pytest.mark.parametrize("name", ["tiny", "tiny-mixed"])
def test_the_engine_decodes_each_utterance_to_its_own_end(name):
    generation = Generation(CASES[name], CPU)
    decode = generation.by_engine()
    for found in (decode(), decode()):
        assert [len(tokens) for tokens in found] == generation.texts
        for ours, wanted in zip(found, generation.standard(range(len(found))), strict=True):
            assert torch.equal(ours, wanted)


def test_what_the_engine_gets_wrong_is_not_timed(monkeypatch):
    right = Generation.by_engine

    def wrong(self, rows=None, slots=None):
        return lambda: [tokens.where(torch.arange(len(tokens)) > 0, -1) for tokens in right(self, rows, slots)()]

    monkeypatch.setattr(Generation, "by_engine", wrong)
    with pytest.raises(RuntimeError, match=r"tiny-mixed: .* 100.00% by generate, .* by engine, wanted 100%; nothing"):
        generate.measure(CASES["tiny-mixed"], 1, device=CPU, dtype=torch.float32, peers=False, quick=True)


def test_a_gpu_may_turn_a_tie_and_no_more(monkeypatch):
    """One row of four that goes another way is told in the share; half of them are too many."""
    case, shares = CASES["tiny"], {"cuda": 0.96}
    monkeypatch.setattr(generate, "equal_in_engine", lambda generation: shares["cuda"])
    monkeypatch.setattr(generate, "equal_tokens", lambda generation: 1.0)
    monkeypatch.setattr(generate, "Generation", lambda *a, **k: None)
    check = generate._check_engine.__wrapped__
    check(case, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"96.00% of the engine's tokens are right, wanted 100%"):
        check(case, CPU)
    shares["cuda"] = 0.94
    with pytest.raises(RuntimeError, match=r"94.00% .* wanted 95%"):
        check(case, torch.device("cuda"))


def test_tokens_depend_on_their_source_and_on_each_other():
    generation = Generation(CASES["tiny"], CPU)
    first, second = generation.standard([0, 1])
    assert not torch.equal(first, second)
    assert min(len(set(tokens.tolist())) for tokens in (first, second)) > 2


@pytest.mark.parametrize("op", ["decode_self_attention", "decode_cross_attention"])
def test_an_attention_that_is_a_little_wrong_is_not_timed(op):
    right = providers.get(op, "reference").function

    def wrong(*arguments):
        result = right(*arguments)
        return result * 1.1 if isinstance(result, torch.Tensor) else (result[0] * 1.1, *result[1:])

    case = replace(CASES["tiny"], batch=4, tokens=24, peers=())
    providers.register(providers.Provider(op, "wrong", wrong), before=providers.names(op)[0])
    try:
        with pytest.raises(RuntimeError, match="nothing was timed"):
            generate.measure(case, 1, device=CPU, dtype=torch.float32, peers=False, quick=True)
    finally:
        del providers._providers[op][0]
        providers.chosen(op).clear()


def test_in_mixed_batches_the_engine_is_what_is_aimed_with(monkeypatch):
    """Others run until the last one of a batch has ended."""
    monkeypatch.setattr(variants, "apart", lambda *arguments: lambda: None)
    for name, aiming in (("tiny", {OURS, STANDARD, ENGINE}), ("tiny-mixed", {ENGINE})):
        case = replace(CASES[name], peers=(CTRANSLATE2,), wanted={CTRANSLATE2: 1e9})
        found, _ = generate.measure(case, 1, device=CPU, dtype=torch.float32, peers=True, quick=True)
        assert {row["variant"] for row in found} == {OURS, STANDARD, ENGINE, CTRANSLATE2}
        assert {row["variant"] for row in found if "wanted" in row} == aiming
        assert not any(row["reached"] for row in found if "wanted" in row)


@pytest.mark.slow
def test_the_memory_of_the_engine_is_measured_in_a_process_of_its_own(tmp_path):
    options = ["--memory", "--cases", "tiny", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["bench", "generate", *options]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    found = {row["variant"]: row for row in rows.read(file)}
    assert set(found) == {ENGINE, STANDARD}
    assert all(row["peak_bytes"] >= 0 and row["needed_bytes"] == CASES["tiny"].memory() for row in found.values())


@pytest.mark.slow
def test_the_counting_t5_ends_where_its_source_asks():
    pytest.importorskip("ctranslate2")
    pytest.importorskip("transformers")
    case = CASES["tiny-mixed"]
    ends = list(range(case.ends[0], case.ends[1] + 1))
    decode = t5.by_ctranslate2(case, t5.asking(case, ends, [3] * len(ends)), "float32", "cpu", 1)
    # the step that ends a text counts, as ours does
    assert [tokens + 1 for tokens in decode()] == ends


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny-mixed"])
def test_ctranslate2_takes_as_many_steps_as_ours(name):
    pytest.importorskip("ctranslate2")
    pytest.importorskip("transformers")
    generation = Generation(CASES[name], CPU)
    peers, missing = generation.peers([CTRANSLATE2])
    assert not missing
    ours = [len(tokens) for tokens in generation.by_engine()()]
    assert ours == generation.texts
    assert [tokens + bool(CASES[name].ends) for tokens in peers[CTRANSLATE2]()] == ours
