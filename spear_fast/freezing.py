"""Which parts of a model are trained: the reference's methods for it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from spear_fast.transformer import Transformer


class FreezingMixin(nn.Module):
    """The part of `TextToSemantic` that freezes its parts and lets them be trained again."""

    source_transformer: Transformer
    target_transformer: Transformer
    token_emb: nn.ModuleDict
    start_token: nn.ParameterDict

    def unfreeze_all(self) -> None:
        """Lets every parameter be trained, but for the rotary frequencies, which never are (reference line 562)."""
        set_requires_grad(self, True)

    def freeze_encoder(self) -> None:
        """Takes the encoder's parameters out of training (reference line 565)."""
        set_requires_grad(self.source_transformer, False)

    def freeze_encoder_below_layer(self, layer: int) -> None:
        """Trains the encoder but for its layers 1 to `layer` (reference line 568). Raises ValueError below 0."""
        _check_layer(layer)
        set_requires_grad(self.source_transformer, True)
        for module in self.source_transformer.layers[:layer]:  # type: ignore[union-attr]
            set_requires_grad(module, False)

    def freeze_encoder_above_layer(self, layer: int) -> None:
        """Trains the encoder's layers 1 to `layer` and freezes those above, as the paper fine-tunes.

        Raises ValueError below 0.
        """
        _check_layer(layer)
        set_requires_grad(self.source_transformer, False)
        for module in self.source_transformer.layers[:layer]:  # type: ignore[union-attr]
            set_requires_grad(module, True)

    def freeze_decoder(self) -> None:
        """Takes the decoder's parameters out of training (reference line 581)."""
        set_requires_grad(self.target_transformer, False)

    def freeze_speech_emb(self) -> None:
        """Takes embedding, logits and start vector of speech out of training (reference line 584)."""
        self._freeze_embedding("speech")

    def freeze_text_emb(self) -> None:
        """Takes embedding, logits and start vector of text out of training (reference line 588)."""
        self._freeze_embedding("text")

    def _freeze_embedding(self, modality: Literal["speech", "text"]) -> None:
        set_requires_grad(self.token_emb[modality], False)
        self.start_token[modality].requires_grad = False


def set_requires_grad(module: nn.Module, requires_grad: bool) -> None:
    """Lets the parameters of a module be trained, or not; rotary frequencies never are."""
    for name, parameter in module.named_parameters():
        # constants that the state dict carries
        if not name.endswith("rotary_emb.freqs"):
            parameter.requires_grad = requires_grad


def _check_layer(layer: int) -> None:
    if layer < 0:
        raise ValueError(f"layer must be at least 0, a number of layers from the lowest on, got {layer}.")
