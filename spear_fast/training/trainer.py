"""The reference's three trainers, over one loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from spear_fast.model import TextToSemantic
from spear_fast.training.base import Trainer
from spear_fast.training.data import GeneratedAudioTextDataset
from spear_fast.wrappers import SemanticToTextWrapper, SpeechSpeechPretrainWrapper, TextToSemanticWrapper

_SHARED = (
    "num_train_steps", "num_warmup_steps", "batch_size", "lr", "initial_lr", "grad_accum_every", "wd", "max_grad_norm",
    "valid_frac", "random_split_seed", "log_every", "save_results_every", "save_model_every", "results_folder",
    "accelerate_kwargs", "split_batches", "drop_last", "force_clear_prev_results", "resume", "max_batch_tokens",
    "num_valid_batches", "num_workers", "input_sample_hz", "checkpoint_activations",
)  # fmt: skip
# begin the names of parameters that not every task has a use for
_START = {"speech": "start_token.speech", "text": "start_token.text"}
_EARLY_EXIT = "to_early_exit_semantic_logits."


def _shared_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns those of a trainer's arguments that `Trainer` takes. Raises TypeError when `model` is none of ours."""
    if not isinstance(arguments["model"], TextToSemantic):
        got = type(arguments["model"])
        raise TypeError(
            f"model must be a spear_fast.TextToSemantic, got {got.__module__}.{got.__name__}; "
            "spear_fast.accelerate makes one of the reference's."
        )
    return {name: arguments[name] for name in _SHARED}


class SpeechSpeechPretrainer(Trainer):
    """Denoising pretraining on speech (reference trainer.py:77).

    The dataset gives semantic ids `[n]` or raw audio `[samples]`; deletion_prob, reconstruct_seq, mask_id: see
    `SpeechSpeechPretrainWrapper`; the others: see `Trainer`.
    """

    name, prefix = "speechspeech", "speech.speech"
    source_type, target_type = "speech", "speech"

    def __init__(
        self,
        model: TextToSemantic,
        wav2vec: nn.Module | None = None,
        *,
        num_train_steps: int,
        num_warmup_steps: int,
        batch_size: int,
        dataset: Dataset[Any] | None = None,
        deletion_prob: float = 0.6,
        reconstruct_seq: bool = False,
        mask_id: int | None = None,
        lr: float = 3e-4,
        initial_lr: float = 1e-5,
        grad_accum_every: int = 1,
        wd: float = 0.0,
        max_grad_norm: float | None = 0.5,
        valid_frac: float = 0.05,
        random_split_seed: int = 42,
        log_every: int = 10,
        save_results_every: int = 100,
        save_model_every: int = 1000,
        results_folder: str | Path = "./results",
        accelerate_kwargs: dict[str, Any] = {},  # noqa: B006 (the reference's signature)
        split_batches: bool = False,
        drop_last: bool = False,
        force_clear_prev_results: bool | None = None,
        resume: bool = False,
        max_batch_tokens: int | None = None,
        num_valid_batches: int = 8,
        num_workers: int = 0,
        input_sample_hz: int | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        shared = _shared_arguments(locals())
        wrapper = SpeechSpeechPretrainWrapper(model, wav2vec, deletion_prob, reconstruct_seq, mask_id)
        shared["unused"] = (*_of("text"), _EARLY_EXIT)
        super().__init__(model, wrapper, dataset, [model.semantic_pad_id], wav2vec=wrapper.wav2vec, **shared)

    def optimized_parameters(self) -> list[nn.Parameter]:
        # the reference's optimizer knows the frozen ones too
        return list(self.model.parameters())

    def loss_of(self, wrapper: nn.Module, batch: Any) -> Tensor:
        (speech,) = batch
        loss = wrapper(self.speech_ids(speech), return_logits=False)
        return loss


class SemanticToTextTrainer(Trainer):
    """Trains the decoder to write what the frozen encoder heard (reference trainer.py:325): back-translation.

    The dataset gives (semantic ids or raw audio, text ids). The model's encoder and speech embeddings stay frozen
    afterwards; `unfreeze_all` undoes it. Arguments: see `Trainer`.
    """

    name, prefix = "semantictext", "semantic.text"
    source_type, target_type = "speech", "text"

    def __init__(
        self,
        model: TextToSemantic,
        *,
        num_train_steps: int,
        num_warmup_steps: int,
        batch_size: int,
        dataset: Dataset[Any] | None = None,
        lr: float = 3e-4,
        initial_lr: float = 1e-5,
        grad_accum_every: int = 1,
        wd: float = 0.0,
        max_grad_norm: float | None = 0.5,
        valid_frac: float = 0.05,
        random_split_seed: int = 42,
        log_every: int = 10,
        save_results_every: int = 100,
        save_model_every: int = 1000,
        results_folder: str | Path = "./results",
        accelerate_kwargs: dict[str, Any] = {},  # noqa: B006 (the reference's signature)
        split_batches: bool = False,
        drop_last: bool = False,
        force_clear_prev_results: bool | None = None,
        resume: bool = False,
        max_batch_tokens: int | None = None,
        num_valid_batches: int = 8,
        num_workers: int = 0,
        input_sample_hz: int | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        shared = _shared_arguments(locals())
        model.unfreeze_all()
        model.freeze_speech_emb()
        model.freeze_encoder()
        pads = _pair_pads(model)
        shared["unused"] = (_START["speech"], _EARLY_EXIT)
        super().__init__(model, SemanticToTextWrapper(model), dataset, pads, wav2vec=model.wav2vec, **shared)

    def optimized_parameters(self) -> list[nn.Parameter]:
        # the reference's optimizer knows the decoder's rotary frequencies too, which never change
        frequencies = "target_transformer.layers.0.0.rotary_emb.freqs"
        return [p for name, p in self.model.named_parameters() if p.requires_grad or name == frequencies]

    def loss_of(self, wrapper: nn.Module, batch: Any) -> Tensor:
        speech, text = batch
        loss = wrapper(self.speech_ids(speech), text, return_logits=False)
        return loss


class TextToSemanticTrainer(Trainer):
    """Trains text to speech tokens on labelled and pseudo-labelled pairs (reference trainer.py:578).

    The dataset gives (semantic ids or raw audio, text ids). As in the paper the decoder and the upper layers of the
    encoder are frozen, and text embeddings and the lowest `train_encoder_layers` are trained; `unfreeze_all` undoes it.
    generated_audio_text_dataset_folder, dataset_delimiter_id: see `GeneratedAudioTextDataset`; joined with `dataset`.
    should_train_early_exit_layer_if_available: trains that head too. The others: see `Trainer`.
    freeze_encoder_layers_below: the reference's, for scripts that set it: freezes that many of the lowest layers
        instead and trains those above.
    """

    name, prefix = "textsemantic", "text.semantic"
    source_type, target_type = "text", "speech"

    def __init__(
        self,
        model: TextToSemantic,
        *,
        num_train_steps: int,
        num_warmup_steps: int,
        batch_size: int,
        dataset: Dataset[Any] | None = None,
        generated_audio_text_dataset_folder: str | None = None,
        dataset_delimiter_id: int = -1,
        lr: float = 3e-4,
        initial_lr: float = 1e-5,
        grad_accum_every: int = 1,
        wd: float = 0.0,
        max_grad_norm: float | None = 0.5,
        valid_frac: float = 0.05,
        random_split_seed: int = 42,
        log_every: int = 10,
        save_results_every: int = 100,
        save_model_every: int = 1000,
        results_folder: str | Path = "./results",
        accelerate_kwargs: dict[str, Any] = {},  # noqa: B006 (the reference's signature)
        split_batches: bool = False,
        drop_last: bool = False,
        force_clear_prev_results: bool | None = None,
        freeze_encoder_layers_below: int | None = None,
        should_train_early_exit_layer_if_available: bool = True,
        train_encoder_layers: int = 2,
        resume: bool = False,
        max_batch_tokens: int | None = None,
        num_valid_batches: int = 8,
        num_workers: int = 0,
        input_sample_hz: int | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        shared = _shared_arguments(locals())
        if freeze_encoder_layers_below is not None and train_encoder_layers != 2:
            raise ValueError("freeze_encoder_layers_below and train_encoder_layers exclude each other, got both.")
        datasets = [] if dataset is None else [dataset]
        if generated_audio_text_dataset_folder is not None:
            speech_eos, text_eos = (
                model.eos_id[kind] if model.autoset_eos_id[kind] else None for kind in ("speech", "text")
            )
            generated = GeneratedAudioTextDataset(
                generated_audio_text_dataset_folder,
                dataset_delimiter_id,
                speech_eos_id=speech_eos,
                text_eos_id=text_eos,
            )
            datasets.append(generated)
        if not datasets:
            raise ValueError("dataset or generated_audio_text_dataset_folder must be given, got neither.")
        model.unfreeze_all()
        model.freeze_speech_emb()
        if freeze_encoder_layers_below is not None:
            model.freeze_encoder_below_layer(freeze_encoder_layers_below)
        else:
            model.freeze_encoder_above_layer(train_encoder_layers)
        model.freeze_decoder()
        joined: Dataset[Any] = ConcatDataset(datasets)
        early_exit = model.target_has_early_exit and should_train_early_exit_layer_if_available
        shared["unused"] = (_START["text"],) if early_exit else (_START["text"], _EARLY_EXIT)
        super().__init__(
            model, TextToSemanticWrapper(model), joined, _pair_pads(model), wav2vec=model.wav2vec, **shared
        )
        self.train_early_exit = early_exit

    def loss_of(self, wrapper: nn.Module, batch: Any) -> Tensor:
        speech, text = batch
        loss = wrapper(text, self.speech_ids(speech), return_early_exit_loss=self.train_early_exit, return_logits=False)
        return loss


def _of(modality: str) -> tuple[str, ...]:
    return f"token_emb.{modality}.", f"to_logits.{modality}.", _START[modality]


def _pair_pads(model: TextToSemantic) -> list[int]:
    return [model.pad_id["speech"], model.pad_id["text"]]
