"""The shapes that are measured, and what each must compute and read at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

REFERENCE, CTRANSLATE2, CTRANSLATE2_INT8 = "reference", "ctranslate2 float32", "ctranslate2 int8_float32"
TRANSFORMERS, TRANSFORMERS_STATIC = "transformers", "transformers static cache"
REPAIRED = "reference, flash repaired"
OURS, STANDARD, ENGINE = "spear_fast", "spear_fast standard", "spear_fast engine"
ENGINE_INT8 = "spear_fast engine int8"


@dataclass(frozen=True)
class Work:
    """What one decoding step must do at least, in bytes and floating-point operations.

    weights: read once for all rows. own: self-attention's keys and values. cross: cross-attention's. selection: logits,
    written and read. moved: rows of the caches that are copied where beams are reordered, none where they stay.
    """

    weights: float
    own: float
    cross: float
    selection: float
    moved: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.weights + self.own + self.cross + self.selection + self.moved

    def floor(self, gbs: float, gflops: float) -> float:
        """Returns the fewest seconds at so many gigabytes and GFLOP a second."""
        return max(self.bytes / gbs, self.flops / gflops) / 1e9

    def bound(self, gbs: float, gflops: float) -> str:
        return "bandwidth" if self.bytes / gbs >= self.flops / gflops else "matmuls"


@dataclass(frozen=True)
class Case:
    """One model and one batch: `batch` sources of `source` ids, `tokens` output tokens for each, no early end.

    beam: hypotheses for each source, 1 for greedy.
    ends: where utterances end at lengths of their own, between which they are drawn; sources then are from `shortest`
        to `source` ids long. slots: utterances that are decoded at the same time.
    peers: what it is compared with. wanted: peer → how many times as fast to be.
    sets: where it belongs: tiny, cpu or gpu.
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
    shortest: int | None = None
    ends: tuple[int, int] | None = None
    slots: int = 32
    peers: tuple[str, ...] = ()
    wanted: Mapping[str, float] = field(default_factory=dict, hash=False)
    sets: tuple[str, ...] = ("cpu",)

    def drawn(self) -> tuple[list[int], list[int]]:
        """Returns the length of each source and of each text, the same ones every time."""
        if self.ends is None:
            return [self.source] * self.batch, [self.tokens] * self.batch
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(self.shortest or self.source, self.source + 1, (self.batch,), generator=generator)
        texts = torch.randint(self.ends[0], self.ends[1] + 1, (self.batch,), generator=generator)
        return lengths.tolist(), texts.tolist()

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
        sizes = asdict(self)
        for name in ("peers", "wanted", "sets"):
            del sizes[name]
        return sizes

    def encoder_weights(self) -> int:
        attention = self.heads * self.head_dim
        return self.source_layers * (4 * self.dim * attention + 3 * self.dim * self.inner)

    def decoder_weights(self) -> int:
        attention, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.dim * (attention + 2 * shared) + 3 * self.dim * attention + 3 * self.dim * self.inner
        return self.target_layers * layer + self.vocabulary * self.dim

    def flops(self) -> float:
        """Floating-point operations of encoding, projecting and decoding, each piece of work done once."""
        attention = self.heads * self.head_dim
        total = 0
        for source, tokens in zip(*self.drawn(), strict=True):
            encoder = 2 * source * self.encoder_weights() + 4 * self.source_layers * source * source * attention
            projection = 4 * source * self.target_layers * self.dim * attention
            history = tokens * (tokens + 1) // 2
            decoder = tokens * 2 * self.beam * self.decoder_weights()
            decoder += 4 * self.target_layers * self.beam * attention * (tokens * (source + 1) + history)
            total += encoder + projection + decoder
        return float(total)

    def bytes(self, size: int = 4) -> float:
        """Bytes that decoding reads at least: a step's weights for all, shared cross K/V, the beams' own histories."""
        attention, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        lengths, texts = self.drawn()
        # in slots that are always full
        steps = sum(texts) / min(self.slots if self.ends else self.batch, self.batch)
        total = steps * self.decoder_weights()
        for source, tokens in zip(lengths, texts, strict=True):
            total += self.target_layers * tokens * (source + 1) * 2 * attention
            total += self.target_layers * self.beam * 2 * shared * (tokens * (tokens + 1) // 2)
        return float(size * total)

    def step(self, generated: int, size: int = 2, *, shared: bool = True, distinct: int | None = None) -> Work:
        """Returns the work of the step after `generated` tokens of each hypothesis, over the longest sources.

        size: bytes of a number. shared: cross-attention's keys and values are read once for all beams of an utterance
        and no cache is moved; otherwise once a beam, and every cache is copied. distinct: (position, ancestor) pairs of
        an utterance's history, from the positions alone to `beam` times as many, which is what is taken.
        """
        attention, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        rows, positions, source = self.batch * self.beam, generated + 1, self.source + 1
        distinct = self.beam * positions if distinct is None else distinct
        layers, copies = self.target_layers, 1 if shared else self.beam
        return Work(
            weights=size * self.decoder_weights(),
            own=size * layers * self.batch * distinct * keys,
            cross=size * layers * self.batch * copies * source * 2 * attention,
            selection=8 * rows * self.vocabulary,
            moved=0 if shared else size * 2 * layers * rows * generated * keys,
            flops=2 * rows * self.decoder_weights() + 4 * layers * rows * attention * (positions + source),
        )

    def steps_floor(self, gbs: float, gflops: float, size: int = 2) -> float:
        """Returns the fewest seconds of all decoding steps of the batch, at these rates; encoding not counted."""
        return sum(self.step(generated, size).floor(gbs, gflops) for generated in range(self.tokens))

    def memory(self, size: int = 4) -> float:
        """Bytes that must be held: the weights of both sides, the encoder's output, cross K/V, every beam's history."""
        attention, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.encoder_weights() + self.decoder_weights() + self.vocabulary * self.dim
        weights += 2 * self.target_layers * self.dim * attention
        positions = self.batch * self.source
        crossed = self.target_layers * positions * 2 * attention
        history = self.target_layers * self.batch * self.beam * self.tokens * 2 * shared
        return float(size * (weights + positions * self.dim + crossed + history))


_FLOAT32 = (CTRANSLATE2, TRANSFORMERS)
_TINY = Case(
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
    peers=(REFERENCE, *_FLOAT32),
    sets=("tiny",),
)
_LARGE = dict(dim=1024, source_layers=12, target_layers=12, heads=16)


MODELS: dict[str, dict[str, Any]] = {"512x6": {}, "1024x12": _LARGE}


def _on_gpu() -> list[Case]:
    """Returns the sizes at which GPUs are measured: models by utterances and beams, 512 numbers a vocabulary.

    The most telling first: time there is short. Peers take part where they take a fair share of it.
    """
    sizes = ((128, 5, 500), (32, 4, 500), (512, 5, 500), (1, 1, 250))
    common: dict[str, Any] = dict(vocabulary=512, tokens=100, sets=("gpu",))
    return [
        Case(
            f"{name} {batch}x{beam}",
            batch=batch,
            beam=beam,
            source=source,
            peers=(TRANSFORMERS_STATIC,) if batch == 32 else (),
            **model,
            **common,
        )
        for batch, beam, source in sizes
        for name, model in MODELS.items()
    ]


def labelling(name: str, batch: int = 512) -> Case:
    """Returns the job of labelling `batch` clips of 20 s: 1,000 source ids, 300 output tokens, 5 beams.

    name: of the model, "512x6" or "1024x12".
    """
    return Case(
        f"label {name}", batch=batch, beam=5, source=1000, tokens=300, slots=batch, vocabulary=512, **MODELS[name]
    )


# steps that are looked into, by name: the source is long, and of 80 to 120 tokens a step is taken on average.
# utterances, beams → the share of the roofline to reach, in percent; one utterance alone is to be within 3 times of it
STEPS = {(512, 5): 75.0, (128, 5): 75.0, (32, 4): 60.0, (1, 1): 33.3}
STEP_TOKENS = (80, 120)
# beam search is compared with greedy decoding of as many rows
EQUAL_ROWS = {(128, 5): (640, 1)}


def step_cases() -> list[Case]:
    """Returns the cases of single steps, the most telling first; each greedy one before the beam search."""
    found = [replace(_TINY, name=f"step tiny {b}x{k}", batch=b, beam=k, tokens=60) for b, k in ((6, 1), (2, 3))]
    found += [
        replace(CASES[name], name=f"step {name}", peers=(), wanted={}) for name in ("b32-beam4", "b8-beam4", "b1-beam4")
    ]
    for batch, beam in STEPS:
        for name, model in MODELS.items():
            for rows, beams in filter(None, (EQUAL_ROWS.get((batch, beam)), (batch, beam))):
                found.append(
                    Case(
                        f"step {name} {rows}x{beams}",
                        batch=rows,
                        beam=beams,
                        source=500 if batch == 1 else 1000,
                        tokens=STEP_TOKENS[1],
                        vocabulary=512,
                        sets=("gpu",),
                        **model,
                    )
                )
    return found


CASES = {
    case.name: case
    for case in (
        Case("b8-beam4", peers=(REFERENCE, *_FLOAT32), wanted={REFERENCE: 18.0}),
        Case("b8-greedy", beam=1, peers=(REFERENCE, *_FLOAT32)),
        Case("b1-beam4", batch=1, peers=(REFERENCE, *_FLOAT32, CTRANSLATE2_INT8), wanted={CTRANSLATE2: 1.1}),
        Case(
            "b32-beam4",
            batch=32,
            peers=(*_FLOAT32, CTRANSLATE2_INT8),
            wanted={CTRANSLATE2: 1.25, CTRANSLATE2_INT8: 1.3},
        ),
        Case("b32-beam10", batch=32, beam=10, peers=(CTRANSLATE2,)),
        Case(
            "b256-mixed",
            batch=256,
            source=500,
            shortest=50,
            tokens=120,
            ends=(10, 120),
            peers=(CTRANSLATE2,),
            wanted={CTRANSLATE2: 1.5},
        ),
        _TINY,
        replace(_TINY, name="tiny-mixed", batch=5, shortest=5, ends=(2, 8), dim=128, heads=8, slots=2,
                peers=(CTRANSLATE2,)),
        *_on_gpu(),
    )
}  # fmt: skip
