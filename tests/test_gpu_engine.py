"""Generation and labelling on a CUDA device: the host's tokens, batch-invariant bits, jobs that are resumed."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_models import assert_same_in_any_company, sources, tiny_model
from labelling_jobs import random_rows, read_rows, shard_bytes, write_lines
from labelling_jobs import tiny_model as tiny_labeller
from test_engine import options_of

from spear_fast.labelling import Interrupted, LabelOptions, label

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

HOW = {
    "greedy": dict(temperature=0.0, no_repeat_ngram_size=2),
    "standard": dict(beam_search_decode=True, beam_mode="standard", num_return_sequences=3, coverage_penalty=0.5),
    "guided": dict(beam_search_decode=True, beam_mode="standard", cond_scale=2.0, min_length=3),
    "reference": dict(beam_search_decode=True),
}


def with_alignment(number: int):
    return options_of(number, return_alignment=True)


@pytest.mark.parametrize("how", HOW)
def test_generate_gives_what_the_host_gives(how):
    ids = torch.nn.utils.rnn.pad_sequence(sources(9, seed=31), batch_first=True, padding_value=-1)
    mask = ids >= 0
    # a row with a hole is encoded by the modules
    mask[3, 0] = False
    kwargs = dict(source_type="speech", target_type="text", max_length=12, return_result=True, return_alignment=True)
    wanted, found = (
        model.generate(ids.to(model.device), source_mask=mask.to(model.device), **kwargs, **HOW[how])
        for model in (tiny_model(), tiny_model().to(DEVICE))
    )
    assert found.tokens.device.type == found.alignment.device.type == DEVICE
    found = found.to("cpu")
    assert found.tokens.tolist() == wanted.tokens.tolist()
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.alignment, wanted.alignment, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_results_are_the_same_to_the_bit_in_any_company(dtype):
    model = tiny_model().to(DEVICE, dtype)
    assert_same_in_any_company(model, with_alignment, requests=30, slots=6, by_itself=range(30))


def test_a_large_model_in_a_full_engine_is_deterministic():
    """Where a matmul's kernel is chosen by the number of its rows: a dim of 1024, and 256 slots of 4 hypotheses."""
    model = tiny_model(1024, heads=16, dim_head=64, target_kv_heads=4, target_depth=4).to(DEVICE, torch.bfloat16)
    # twice as many as there are slots: some take those of others that have left
    assert_same_in_any_company(model, with_alignment, requests=512, slots=256, by_itself=range(0, 512, 37))


def test_a_job_that_is_stopped_goes_on_to_the_same_files(tmp_path):
    tokens = write_lines(tmp_path / "tokens.jsonl", random_rows(60))
    options = LabelOptions(max_length=12, rows_per_shard=10, batch_tokens=2048, device=DEVICE)
    label([tokens], tiny_labeller(), tmp_path / "whole", options)
    runs = 0
    while True:
        stop, runs = threading.Event(), runs + 1

        def after_some(event, stop=stop, **fields):
            if event == "batch" and not fields["restored"]:
                stop.set()

        after_some.close = lambda: None
        try:
            label([tokens], tiny_labeller(), tmp_path / "out", options, report=after_some, stop=stop)
        except Interrupted:
            continue
        break
    assert runs > 3
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert len(read_rows(tmp_path / "out")) == 60
