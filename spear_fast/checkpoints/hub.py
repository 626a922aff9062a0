"""Model folders in the Hub's convention: `config.json`, `model.safetensors`, and the tokenizers beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from tokenizers import Tokenizer
from torch import Tensor, nn

from spear_fast.checkpoints.model_config import check_depths, read_config
from spear_fast.checkpoints.weights import fitted, load_into, read_state, write_state

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
    """Encodes strings: ids `[batch, length]`, int64, padded at the end with `pad_id`.

    Padding that the tokenizer does by itself is taken off: it would be read as words. Raises ValueError where the
    tokenizer cuts a text.
    """

    def __init__(self, tokenizer: Tokenizer, pad_id: int) -> None:
        self.tokenizer = tokenizer
        self.pad_id = pad_id

    def __call__(self, texts: list[str]) -> Tensor:
        rows = []
        for number, encoding in enumerate(self.tokenizer.encode_batch(texts)):
            if encoding.overflowing:
                raise ValueError(
                    f"text {number} has more ids than the {len(encoding.ids)} at which its "
                    "tokenizer cuts; take truncation out of tokenizer.json, or call model.tokenizer.no_truncation()."
                )
            ids, mask = torch.tensor([encoding.ids, encoding.attention_mask], dtype=torch.long)
            rows.append(ids[mask.bool()])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)


class HubModel(nn.Module, ModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a module with `config`, `tokenizer` and `wav2vec`."""

    config: dict[str, Any]
    tokenizer_encode: Callable[[list[str]], Tensor] | None
    tokenizer: Tokenizer | None
    wav2vec: nn.Module | None

    @classmethod
    def from_config(cls, config: dict[str, Any], origin: Path) -> Self:
        """Returns a fresh model; raises ValueError naming `origin` when arguments are missing, unknown or wrong."""
        try:
            return cls(**config)
        except TypeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{origin} must hold the model's constructor arguments: {reason}.") from error
        except ValueError as error:
            raise ValueError(f"{origin} makes no model: {error}") from error

    @classmethod
    def from_state(
        cls, config: dict[str, Any], state: dict[str, Tensor], *, config_path: Path, weights_path: Path
    ) -> Self:
        """Returns a model with the weights `state`, in evaluation mode; see `load_model`.

        Nothing of the configuration's sizes is allocated before they have been compared with the tensors'.
        Raises ValueError naming one of the two files when they do not fit together.
        """
        check_depths(config, state, weights_path)
        try:
            with torch.device("meta"):
                sizes_alone = cls.from_config(config, config_path)
        except RuntimeError as error:
            raise ValueError(f"{config_path} has sizes that no memory holds; give those of the weights.") from error
        fitted(sizes_alone, state, weights_path)
        model = cls.from_config(config, config_path)
        load_into(model, state, weights_path)
        return model.eval()

    def attach_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Makes `tokenizer` the model's text tokenizer: strings become sources, `save_pretrained` saves it.

        Raises ValueError when the tokenizer has an id that the model has not, `num_text_token_ids` or more.
        """
        count, highest = self.config["num_text_token_ids"], max(tokenizer.get_vocab().values(), default=-1)
        if highest >= count:
            raise ValueError(
                f"the tokenizer must have ids below {count}, the model's num_text_token_ids, got {highest}; give the "
                "tokenizer that the model was trained with."
            )
        self.tokenizer = tokenizer
        self.tokenizer_encode = TokenizerEncode(tokenizer, self.config["text_pad_id"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """Returns the model in a folder or a repository of the Hub, in evaluation mode; see `load_model`.

        kwargs: constructor arguments that replace those found, and those of `ModelHubMixin.from_pretrained`.
        Raises FileNotFoundError, or ValueError in one sentence when the files do not make a model.
        """
        config = Path(pretrained_model_name_or_path) / "config.json"
        if config.is_file():
            read_config(config)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_state(self, save_directory / WEIGHTS_NAME, without="wav2vec.")
        self._hub_mixin_config = self.config
        if self.tokenizer is not None:
            (save_directory / TOKENIZER_NAME).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
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
        weights = folder / WEIGHTS_NAME
        model = cls.from_state(
            model_kwargs, read_state(weights), config_path=folder / "config.json", weights_path=weights
        )
        if (folder / TOKENIZER_NAME).is_file():
            model.attach_tokenizer(_read_tokenizer(folder / TOKENIZER_NAME))
        return model


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer: {error}; copy it again from its source.") from error
