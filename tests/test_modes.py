"""Generation leaves the caller's model as it was, and works in whatever mode of torch it is called in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import SMALL, build_pair, fake_speech_tokenizer, random_ids
from torch import Tensor, nn

import spear_fast
from spear_fast import DecodingOptions
from spear_fast.evaluation import evaluation_mode

TO_TEXT = dict(source_type="speech", target_type="text", max_length=7)
METHODS = {
    "greedy": dict(temperature=0.0),
    "sampling": dict(),
    "beam": dict(beam_search_decode=True),
    "standard beam": dict(beam_search_decode=True, beam_mode="standard"),
}


def modes_of(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def generate(model, method: dict, source: Tensor) -> list:
    torch.manual_seed(0)
    return model.generate(source, **TO_TEXT, **method).tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_under_autocast(method: str, dtype: torch.dtype) -> None:
    model, source = build_pair(3)[1], random_ids(3, 9, 17)
    with torch.autocast("cpu", dtype=dtype):
        # packed in it as well
        inside = generate(model, METHODS[method], source)
    assert inside == generate(build_pair(3)[1], METHODS[method], source)


def test_everything_else_that_decodes_under_autocast() -> None:
    model = build_pair(3, target_early_exit_layer=1)[1]
    source, text = random_ids(2, 9, 17), random_ids(2, 5, 13)
    spoken = dict(source_type="text", target_type="speech", max_length=7, spec_decode=True)

    def results(model) -> list:
        torch.manual_seed(0)
        found = [model.generate(text, **spoken).tolist()]
        memory, mask, _ = model.encode(source, source_type="speech")
        options = DecodingOptions(method="beam", beam_size=2, max_length=7)
        found.append(list(model.decode(memory.float(), mask, target_type="text", options=options).tokens.shape))
        with model.engine(slots=2, max_length=7) as engine:
            requests = [engine.submit(torch.cat((row, torch.tensor([17])))) for row in source]
            found += [request.result().tokens.tolist() for request in requests]
        return found

    outside = results(build_pair(3, target_early_exit_layer=1)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert results(model) == outside


@pytest.mark.parametrize("way", ["packed", "modules"])
def test_modes_of_every_part_stay(way: str) -> None:
    model = spear_fast.TextToSemantic(**SMALL, attn_dropout=0.4, ff_dropout=0.4).train()
    # a frozen decoder, as fine-tuning has it
    model.target_transformer.eval()
    if way == "modules":
        model.source_transformer.layers[0][0].register_forward_hook(lambda *_: None)
    before, source = modes_of(model), random_ids(3, 9, 17)
    assert True in before
    assert False in before
    trained = generate(model, METHODS["greedy"], source)
    assert modes_of(model) == before
    # and no dropout went into it
    assert trained == generate(model.eval(), METHODS["greedy"], source)


class Slow(nn.Module):
    """A speech tokenizer in which two threads meet, and which notes the mode that it was called in."""

    codebook_size = 17

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.meeting = threading.Barrier(2, timeout=30)
        self.leaving = threading.Event()
        self.seen: list[bool] = []

    def forward(self, audio: Tensor) -> Tensor:
        first = self.meeting.wait() == 0
        self.seen.append(self.training)
        if not first:
            # the other one has left evaluation mode by now
            assert self.leaving.wait(30)
            self.seen.append(self.training)
        return (audio.abs() * 100).long() % 17


def test_threads_leave_the_modes_as_they_were() -> None:
    model = spear_fast.TextToSemantic(**{**SMALL, "num_semantic_token_ids": None, "wav2vec": Slow()}).train()
    before = modes_of(model)

    def label(audio: Tensor) -> None:
        model.encode(audio, source_type="speech")
        model.wav2vec.leaving.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(label, torch.randn(2, 1, 30)))
    assert model.wav2vec.seen == [False] * 3
    assert modes_of(model) == before


def test_many_threads_generate_from_a_model_in_training() -> None:
    model, source = spear_fast.TextToSemantic(**SMALL, attn_dropout=0.4).train(), random_ids(2, 9, 17)
    hook = model.source_transformer.layers[0][0].register_forward_hook(lambda *_: None)
    wanted = generate(model, METHODS["greedy"], source)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model.generate(source, **TO_TEXT, temperature=0.0).tolist(), range(24)))
    assert found == [wanted] * 24
    assert all(modes_of(model))
    hook.remove()


def failing(*_: object) -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize("leave", [lambda: None, failing], ids=["returns", "raises"])
def test_evaluation_mode_nests(leave: Callable[[], None]) -> None:
    module = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    module[1].eval()
    try:
        with evaluation_mode(module), evaluation_mode(module):
            assert not any(modes_of(module))
            leave()
    except RuntimeError:
        assert leave is failing
    assert modes_of(module) == [True, True, False]


def test_speech_tokenizer_keeps_its_mode() -> None:
    wav2vec = fake_speech_tokenizer(17).train()
    model = spear_fast.TextToSemantic(**{**SMALL, "num_semantic_token_ids": None, "wav2vec": wav2vec})
    model.encode(torch.randn(1, 2000), source_type="speech")
    assert wav2vec.training
