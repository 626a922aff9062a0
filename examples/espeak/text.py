"""The recipe's text tokenizer: one id for each character."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD = "<pad>"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer of the characters in `texts`; id 0 is the pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    # no room for merges: the alphabet alone
    trainer = trainers.BpeTrainer(vocab_size=1, special_tokens=[PAD], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
