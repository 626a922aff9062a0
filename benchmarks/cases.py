"""The shapes that are measured, and what each must compute and read at least."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One model and one batch: `batch` sources of `source` ids, `tokens` output tokens for each, no early end.

    beam: hypotheses for each source, 1 for greedy.
    """

    name: str
    dim: int = 512
    source_layers: int = 6
    target_layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 500
    batch: int = 8
    source: int = 250
    tokens: int = 64
    beam: int = 4

    @property
    def inner(self) -> int:
        return int(self.dim * 4 * 2 / 3)

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of the reference's `TextToSemantic`, speech to text, with nothing that ends a text."""
        return dict(
            dim=self.dim,
            source_depth=self.source_layers,
            target_depth=self.target_layers,
            heads=self.heads,
            dim_head=self.head_dim,
            target_kv_heads=self.kv_heads,
            num_text_token_ids=self.vocabulary,
            num_semantic_token_ids=self.vocabulary,
            autoset_text_eos_id=False,
            autoset_semantic_eos_id=False,
        )

    def shape(self) -> dict[str, Any]:
        return asdict(self)

    def encoder_weights(self) -> int:
        attention = self.heads * self.head_dim
        return self.source_layers * (4 * self.dim * attention + 3 * self.dim * self.inner)

    def decoder_weights(self) -> int:
        attention, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.dim * (attention + 2 * shared) + 3 * self.dim * attention + 3 * self.dim * self.inner
        return self.target_layers * layer + self.vocabulary * self.dim

    def flops(self) -> float:
        """Floating-point operations of encoding, projecting and decoding, each piece of work done once."""
        attention, rows = self.heads * self.head_dim, self.batch * self.beam
        positions = self.batch * self.source
        encoder = 2 * positions * self.encoder_weights() + 4 * self.source_layers * positions * self.source * attention
        projection = 4 * positions * self.target_layers * self.dim * attention
        history = sum(range(1, self.tokens + 1))
        decoder = self.tokens * 2 * rows * self.decoder_weights()
        decoder += 4 * self.target_layers * rows * attention * (self.tokens * (self.source + 1) + history)
        return float(encoder + projection + decoder)

    def bytes(self, size: int = 4) -> float:
        """Bytes that decoding reads at least, each step: weights, shared cross K/V, the beams' distinct histories."""
        attention, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        step = self.decoder_weights() + self.target_layers * self.batch * (self.source + 1) * 2 * attention
        history = self.target_layers * self.batch * self.beam * 2 * shared * sum(range(1, self.tokens + 1))
        return float(size * (self.tokens * step + history))


CASES = {
    case.name: case
    for case in (
        Case("b8-beam4"),
        Case("b8-greedy", beam=1),
        Case("b1-beam4", batch=1),
        Case("b32-beam4", batch=32),
        Case(
            "tiny",
            dim=64,
            source_layers=2,
            target_layers=2,
            heads=4,
            head_dim=16,
            vocabulary=50,
            batch=2,
            source=20,
            tokens=8,
        ),
    )
}
