"""The recipe's text tokenizer: byte-pair pieces of words, learnt on the training sentences."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 256
PAD = "<pad>"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer of `VOCABULARY_SIZE` pieces at most; id 0 is the pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=[PAD], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
