"""A decoding step reads nothing back from the device and sends nothing to it: what a CUDA graph may record."""

from __future__ import annotations

import importlib
import importlib.util

import ops_inputs
import pytest
import torch
from engine_models import requests_of, sources, tiny_model
from host_reads import DEVICE, NoHostReads
from ops_selection_inputs import random_state
from torch import Tensor

from spear_fast import DecodingOptions
from spear_fast.decoding import runner, search, state
from spear_fast.decoding.methods import Mix, step
from spear_fast.decoding.packed import encoder, memory
from spear_fast.decoding.runner import Runner
from spear_fast.ops.cuda import runtime

BEAM, GREEDY = DecodingOptions(beam_size=3, max_length=12), DecodingOptions(method="greedy", max_length=12)
SAMPLE = DecodingOptions(method="sample", max_length=12, top_k=5, top_p=0.9, no_repeat_ngram_size=2, prefix=(1, 2))
MIXES = {"beam": [BEAM] * 3, "sample": [GREEDY, SAMPLE], "both": [BEAM, SAMPLE, GREEDY]}


@pytest.fixture(scope="module")
def decoder():
    return tiny_model().to(DEVICE).decoder("text")


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_step_reads_nothing_back(decoder, mix, guided):
    """By the plain-torch ops, which is what a step without any kernel is made of."""
    view = Runner(decoder, slots=4, beams=3, positions=13, max_source=10, guided=guided).state
    mixed = Mix.of(enumerate(MIXES[mix]))
    with torch.inference_mode(), NoHostReads(decoder, view) as guard:
        step(decoder, view, mixed)
    assert guard.made > 100


def test_encoding_makes_nobody_wait(monkeypatch):
    packed = tiny_model().to(DEVICE).encoder("speech")
    guard = NoHostReads(packed)
    monkeypatch.setattr(encoder, "to_device", guard.send)
    with torch.inference_mode(), guard:
        memories = packed.encoded(sources(3))
    assert [len(memory) for memory in memories] == [len(source) for source in sources(3)]


def test_a_function_of_the_callers_is_given_its_logits_without_waiting(decoder, monkeypatch):
    view = Runner(decoder, slots=4, beams=3, positions=13, max_source=10, guided=True).state
    own = DecodingOptions(method="sample", max_length=12, filter_logits=lambda logits: logits * 2)
    guard = NoHostReads(decoder, view)
    monkeypatch.setattr(search, "to_device", guard.send)
    with torch.inference_mode(), guard:
        step(decoder, view, Mix.of(enumerate([own, GREEDY, own])))


def test_giving_places_away_makes_nobody_wait(decoder, monkeypatch):
    """What it sends to the device goes through page-locked memory: by `to_device`, and no other way."""
    made = Runner(decoder, slots=4, beams=3, positions=13, max_source=10)
    memories = [torch.empty(n, decoder.dim, device=DEVICE) for n in (3, 10, 1)]
    guard = NoHostReads(decoder, made.state, memories)
    for module in (memory, runner, state):
        monkeypatch.setattr(module, "to_device", guard.send)
    with torch.inference_mode(), guard:
        made.admit(requests_of(memories, MIXES["both"], [1, 2, 3]))
        made.drop(lambda request: request.number == 0)
    assert made.used == 2


WRONG = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.argmax()),
    "list": lambda x: x.tolist(),
    "host": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "mask_written": lambda x: x.__setitem__(x > 0, x[:1]),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "upload": lambda x: x + torch.tensor([1.0, 2.0], device=DEVICE),
    "moved": lambda x: x + torch.ones(2).to(DEVICE),
    "index": lambda x: x[[0, 1]],
    "host_index": lambda x: x[torch.tensor([0, 1])],
    "copied": lambda x: x.copy_(torch.ones(2)),
    "unique": lambda x: x.unique(),
    "repeated": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_guard_sees(what):
    x = torch.ones(2, device=DEVICE)
    # some of these torch itself refuses for the stand-in
    with torch.inference_mode(), pytest.raises((AssertionError, RuntimeError)), NoHostReads(x):
        WRONG[what](x)


CALLS = {
    "append_kv": lambda: ops_inputs.append_kv(rows=6, length=40, size=64),
    "decode_self_attention": lambda: ops_inputs.decode_self_attention(
        beams=5, length=600, size=64, append=True, dim=96
    ),
    "decode_cross_attention": lambda: ops_inputs.decode_cross_attention(beams=5, source=70, size=64),
    "beam_step": lambda: random_state("beam_step", utterances=8, beams=5, vocab=257, capacity=20, guided=True),
    "sample_step": lambda: random_state("sample_step", utterances=8, beams=5, vocab=257, capacity=20, guided=True),
}


def on_device(arguments):
    return [each.to(DEVICE) if isinstance(each, Tensor) else each for each in arguments]


class Unlaunched:
    """Stands for a Triton kernel: takes every launch, and makes none."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **keywords):
        self.launches += 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("op", ["append_kv", "decode_self_attention", "decode_cross_attention"])
def test_what_launches_a_triton_kernel_reads_nothing_back(op, monkeypatch):
    module, kernel = importlib.import_module(f"spear_fast.kernels.{op}"), Unlaunched()
    for name in vars(module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, kernel)
    if hasattr(module, "merge_splits"):
        blocks = importlib.import_module("spear_fast.kernels.blocks")
        monkeypatch.setattr(blocks, "merge_splits_kernel", kernel)
    arguments = on_device(CALLS[op]())
    with torch.inference_mode(), NoHostReads(arguments):
        getattr(module, op)(*arguments)
    assert kernel.launches


@pytest.mark.parametrize("op", ["beam_step", "sample_step"])
def test_what_launches_a_cuda_kernel_reads_nothing_back(op, monkeypatch):
    launches = []
    monkeypatch.setattr(runtime, "launch", lambda *arguments: launches.append(arguments))
    module, arguments = importlib.import_module(f"spear_fast.ops.cuda.{op}"), on_device(CALLS[op]())
    with torch.inference_mode(), NoHostReads(arguments):
        getattr(module, op)(*arguments)
    assert launches
