"""Pretraining and fine-tuning loops of the recipe: a fixed number of steps over batches of about equal length."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from data import Example
from torch import Tensor, nn

from spear_fast import SemanticToTextWrapper, SpeechSpeechPretrainWrapper, TextToSemantic
from spear_fast.speech import MelKMeansTokenizer

BATCH_TOKENS = 2400
PEAK_LEARNING_RATE = 1.2e-3
WARMUP_STEPS = 200
# share of source tokens that training replaces by a neighbouring cluster, drops, or doubles
REPLACED, DROPPED, DOUBLED = 0.08, 0.03, 0.03


def new_model(num_text_token_ids: int, wav2vec: MelKMeansTokenizer, seed: int) -> TextToSemantic:
    """Returns the recipe's model of 2 M parameters, its embeddings scaled for logits of unit variance."""
    torch.manual_seed(seed)
    model = TextToSemantic(
        160,
        source_depth=4,
        target_depth=2,
        heads=4,
        dim_head=40,
        target_kv_heads=2,
        num_text_token_ids=num_text_token_ids,
        wav2vec=wav2vec,
        ff_dropout=0.1,
    )
    for embedding in model.token_emb.values():
        nn.init.normal_(embedding.weight, std=model.dim**-0.5)
    for start in model.start_token.values():
        nn.init.normal_(start, std=model.dim**-0.5)
    return model


class Augment:
    """Varies source tokens as another voice would: neighbouring clusters, a little faster or slower."""

    def __init__(self, tokenizer: MelKMeansTokenizer, rng: np.random.Generator, neighbours: int = 6) -> None:
        distances = torch.cdist(tokenizer.centres, tokenizer.centres)
        # the nearest is the cluster itself
        self.neighbours = distances.argsort(dim=-1)[:, 1 : neighbours + 1].numpy()
        self.rng = rng

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        picked = self.neighbours[tokens, self.rng.integers(self.neighbours.shape[1], size=len(tokens))]
        tokens = np.where(self.rng.random(len(tokens)) < REPLACED, picked, tokens)
        draws = self.rng.random(len(tokens))
        return np.repeat(tokens, np.where(draws < DROPPED, 0, np.where(draws > 1 - DOUBLED, 2, 1)))


def batches(examples: Sequence[Example], lengths: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Yields indices without end: rows of about one length, about `BATCH_TOKENS` tokens together, in random order."""
    while True:
        # jitter keeps the same rows from meeting in every epoch
        order = sorted(range(len(examples)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
        grouped: list[list[int]] = [[]]
        for index in order:
            if lengths[index] * (len(grouped[-1]) + 1) > BATCH_TOKENS:
                grouped.append([])
            grouped[-1].append(index)
        rng.shuffle(grouped)
        yield from grouped


def padded(rows: Sequence[np.ndarray], pad_id: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=pad_id)


def fit(
    model: TextToSemantic, loss_of: Callable[[list[int]], Tensor], order: Iterator[list[int]], steps: int, name: str
) -> float:
    """Trains for `steps` batches and returns the seconds it took; prints the loss now and then."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
    warmup = min(WARMUP_STEPS, steps // 5)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    started, running = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of(next(order))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.item()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(
                f"  {name}: step {step}/{steps}, loss {running / ((step - 1) % 100 + 1):.3f}, {seconds:.0f} s",
                flush=True,
            )
            running = 0.0
    model.eval()
    return time.perf_counter() - started


def pretrain(model: TextToSemantic, examples: Sequence[Example], steps: int, seed: int) -> float:
    """Speech to speech: 60 % of the tokens are deleted, and the model writes them down in order."""
    wrapper = SpeechSpeechPretrainWrapper(model, deletion_prob=0.6)
    torch.manual_seed(seed)
    lengths = [len(example.tokens) for example in examples]

    def loss_of(indices: list[int]) -> Tensor:
        loss, _ = wrapper(padded([examples[index].tokens for index in indices], model.semantic_pad_id))
        return loss

    return fit(model, loss_of, batches(examples, lengths, random.Random(seed)), steps, "pretrain")


def finetune(
    model: TextToSemantic, examples: Sequence[Example], tokenizer: Any, steps: int, seed: int, name: str
) -> float:
    """Speech to text over labelled examples; `tokenizer` is the text tokenizer."""
    wrapper = SemanticToTextWrapper(model)
    torch.manual_seed(seed)
    assert model.wav2vec is not None
    augment = Augment(model.wav2vec, np.random.default_rng(seed))
    texts = [np.array(tokenizer.encode(example.utterance.text).ids) for example in examples]
    lengths = [len(example.tokens) + len(text) for example, text in zip(examples, texts, strict=True)]

    def loss_of(indices: list[int]) -> Tensor:
        speech = padded([augment(examples[index].tokens) for index in indices], model.semantic_pad_id)
        loss, _ = wrapper(speech, padded([texts[index] for index in indices], model.text_pad_id))
        return loss

    return fit(model, loss_of, batches(examples, lengths, random.Random(seed)), steps, name)
