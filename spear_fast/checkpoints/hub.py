"""Model folders in the Hub's convention: `config.json`, `model.safetensors`, and the tokenizers beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from tokenizers import Tokenizer
from torch import Tensor, nn

from spear_fast.checkpoints.weights import load_into, read_state, write_state

WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
SPEECH_TOKENIZER_NAME = "speech_tokenizer.json"

CARD = """---
library_name: spear_fast
pipeline_tag: automatic-speech-recognition
---

A SPEAR-TTS model (arXiv 2302.03540) between text and semantic speech tokens.

    spear_fast.TextToSemantic.from_pretrained("this folder")
"""


class TokenizerEncode:
    """Turns strings into ids `[batch, length]`, padded behind with `pad_id`."""

    def __init__(self, tokenizer: Tokenizer, pad_id: int) -> None:
        self.tokenizer = tokenizer
        self.pad_id = pad_id

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [torch.tensor(encoding.ids, dtype=torch.long) for encoding in self.tokenizer.encode_batch(texts)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)


class HubModel(nn.Module, ModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a module with `config`, `tokenizer` and `wav2vec`."""

    config: dict[str, Any]
    tokenizer_encode: Callable[[list[str]], Tensor] | None
    tokenizer: Tokenizer | None
    wav2vec: nn.Module | None

    @classmethod
    def from_config(cls, config: dict[str, Any], origin: Path) -> Self:
        """Returns a fresh model; raises ValueError naming `origin` when arguments are missing or unknown."""
        try:
            return cls(**config)
        except TypeError as error:
            raise ValueError(f"{origin} must hold the model's constructor arguments: {error}.") from error

    def attach_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Makes `tokenizer` the model's text tokenizer: strings become sources, `save_pretrained` saves it.

        Raises ValueError when the tokenizer has other than `num_text_token_ids` ids.
        """
        size = tokenizer.get_vocab_size()
        if size != self.config["num_text_token_ids"]:
            raise ValueError(
                f"the tokenizer must have {self.config['num_text_token_ids']} ids, the model's, got {size}."
            )
        self.tokenizer = tokenizer
        self.tokenizer_encode = TokenizerEncode(tokenizer, self.config["text_pad_id"])

    def _save_pretrained(self, save_directory: Path) -> None:
        write_state(self, save_directory / WEIGHTS_NAME, without="wav2vec.")
        self._hub_mixin_config = self.config
        if self.tokenizer is not None:
            self.tokenizer.save(str(save_directory / TOKENIZER_NAME))
        if self.wav2vec is not None and hasattr(self.wav2vec, "save"):
            self.wav2vec.save(save_directory)  # type: ignore[operator]
        card = save_directory / "README.md"
        if not card.exists():
            card.write_text(CARD, encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> HubModel:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=["config.json", WEIGHTS_NAME, TOKENIZER_NAME, "speech_tokenizer.*"],
                )
            )
        if "wav2vec" not in model_kwargs and (folder / SPEECH_TOKENIZER_NAME).is_file():
            # at first use: reading audio needs packages that reading token files does not
            from spear_fast.speech import MelKMeansTokenizer

            model_kwargs["wav2vec"] = MelKMeansTokenizer.load(folder)
        model = cls.from_config(model_kwargs, folder / "config.json")
        load_into(model, read_state(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
        if (folder / TOKENIZER_NAME).is_file():
            model.attach_tokenizer(_read_tokenizer(folder / TOKENIZER_NAME))
        return model.eval()


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer: {error}; copy it again from its source.") from error
