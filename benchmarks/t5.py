"""Peers of the same sizes: a T5 with random weights, run by Hugging Face's transformers and by CTranslate2."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.machine import CPU

# the special tokens before the vocabulary
PAD, EOS, UNKNOWN = 0, 1, 2
SPECIAL = 3
# weight of what comes next for certain, where logits may be divided by the root of the dimension
SURE = 60.0


def t5(case: Case, device: torch.device = CPU) -> Any:
    """Returns a `T5ForConditionalGeneration` of the case's sizes, in evaluation mode and made on the device.

    Where the case's utterances end at lengths of their own, source ids say where; see `asking`.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    longest = max(case.ends) if case.ends else 0
    config = T5Config(
        # states of a count and lengths to reach are some of the ordinary ids
        vocab_size=SPECIAL + max(case.vocabulary, 2 * (longest + 1)),
        d_model=case.dim,
        d_kv=case.head_dim,
        d_ff=case.inner,
        num_layers=case.source_layers,
        num_decoder_layers=case.target_layers,
        num_heads=case.heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    with device:
        model = T5ForConditionalGeneration(config).eval()
    if case.ends:
        _count_to_the_end(model, SPECIAL, longest)
    return model


@torch.no_grad()
def _count_to_the_end(model: Any, first: int, longest: int) -> None:
    """Lets the decoder count, state by state, and end where the count is what the source's ids ask for.

    Id `first + i` is the state i of the count, `first + longest + 1 + n` a source that asks for n tokens. Each is a
    direction of the residual stream; cross-attention brings the source's over, and in the last feed-forward, whose two
    halves are multiplied, they meet. All other weights stay random, but too small to matter.
    """
    states, dim = longest + 1, model.config.d_model
    if dim < 2 * states + 1:
        raise ValueError(f"counting to {longest} needs a model of {2 * states + 1} dimensions, got {dim}; use fewer.")
    # some versions of transformers tie it to the embedding whatever they are told
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=3e-4)
    count, asked, end = slice(0, states), slice(states, 2 * states), 2 * states
    embedding, last = model.shared.weight, model.decoder.block[-1].layer[2].DenseReluDense
    one = torch.eye(states)
    cross = model.decoder.block[0].layer[1].EncDecAttention
    # what takes part carries nothing else
    halves = last.wi_0.weight[:states], last.wi_1.weight[:states], last.wo.weight[end]
    for part in (embedding, *halves, cross.o.weight[:, :states], model.lm_head.weight):
        part.zero_()
    embedding[PAD, 0] = 1.0
    embedding[first : first + states, count] = one
    embedding[first + states : first + 2 * states, asked] = one
    # the heads carry the source's direction unchanged
    cross.v.weight[:states, asked] = one
    cross.o.weight[asked, :states] = one * 0.05
    last.wi_0.weight[:states, count] = one
    last.wi_1.weight[:states, asked] = one
    last.wo.weight[end, :states] = 1.0
    # the state i makes i + 1 likely, the meeting point the end
    model.lm_head.weight[first + 1 : first + states, count] = SURE * one[:-1]
    model.lm_head.weight[EOS, end] = SURE


def asking(case: Case, ends: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Returns source ids for utterances of these lengths, such that the T5 takes as many steps as `ends` says.

    The last step is the one that ends the text.
    """
    first = SPECIAL + max(case.ends) + 1
    return [[first + end - 1] * length for end, length in zip(ends, lengths, strict=True)]


def translator(model: Any, compute_type: str, device: str, threads: int) -> tuple[Any, list[str]]:
    """Returns CTranslate2's `Translator` of a T5, converted on the spot, and its vocabulary."""
    import ctranslate2
    from ctranslate2.converters.transformers import T5Loader

    size = model.config.vocab_size
    tokens = ["<pad>", "</s>", "<unk>", *(f"t{i}" for i in range(SPECIAL, size))]
    loader = T5Loader()
    spec = loader.get_model_spec(model)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<pad>", "</s>", "<unk>"
    spec.config.decoder_start_token = "<pad>"
    with tempfile.TemporaryDirectory(prefix="spear-fast-t5-") as folder:
        spec.validate()
        spec.optimize(quantization=None)
        spec.save(folder)
        options = {"compute_type": compute_type, "inter_threads": 1, "intra_threads": threads}
        return ctranslate2.Translator(str(Path(folder)), device=device, **options), tokens


def by_ctranslate2(
    case: Case, sources: Sequence[Sequence[int]], compute_type: str, device: str, threads: int
) -> Callable[[], list[int]]:
    """Returns what decodes all sources by CTranslate2, and returns how many tokens each got, its end not counted.

    Sources of several lengths go through its own batching: sorted, `slots` at a time, those that have ended taken out;
    its search then stops at the best hypothesis' end.
    """
    run, tokens = translator(t5(case), compute_type, device, threads)
    named = [[tokens[i] for i in source] for source in sources]
    bounds: dict[str, Any] = {"min_decoding_length": case.tokens, "max_decoding_length": case.tokens}
    if case.ends:
        bounds = {"max_decoding_length": max(case.ends), "max_batch_size": case.slots, "length_penalty": 0}

    def decode() -> list[int]:
        results = run.translate_batch(named, beam_size=case.beam, max_input_length=0, **bounds)
        return [len(result.hypotheses[0]) for result in results]

    return decode


def by_transformers(
    case: Case, model: Any, sources: Sequence[Sequence[int]], device: torch.device, *, static: bool = False
) -> Callable[..., Tensor]:
    """Returns what decodes all sources, of one length, by `generate` of transformers.

    static: with caches of a fixed size, not compiled. It takes the most tokens, the case's where left out.
    """
    ids = torch.as_tensor(sources, device=device)
    caches: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}

    @torch.inference_mode()
    def decode(most: int = case.tokens) -> Tensor:
        return model.generate(
            ids, num_beams=case.beam, do_sample=False, eos_token_id=None, min_new_tokens=most, max_new_tokens=most,
            **caches,
        )  # fmt: skip

    return decode
