"""The real spear-tts-pytorch 0.4.8, loaded with stubs of four modules of packages that no longer import.

    from reference import load_reference, build_pair

`load_reference()` returns the module `spear_tts_pytorch` itself. The stubs are in `sys.modules` only while it is
imported, so they can neither hide a missing package from another test nor stand in for an installed one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

DISTRIBUTION = "spear-tts-pytorch"
VERSION = "0.4.8"
SAMPLES_PER_TOKEN = 80


class FairseqVQWav2Vec(nn.Module):
    """A stand-in for audiolm-pytorch's class: `forward(wave [b, n] float32) -> ids [b, n // 80] int64`.

    Deterministic: a token is the cluster whose centre is nearest to a fixed projection of its frame of samples. As in
    the real one, the weights belong to the state dict, and a sample rate is believed only when it is passed in.
    """

    def __init__(self, codebook_size: int = 20, *, target_sample_hz: int = 16000) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.codebook_size = codebook_size
        self.target_sample_hz = target_sample_hz
        self.projection = nn.Parameter(torch.randn(SAMPLES_PER_TOKEN, generator=generator) / SAMPLES_PER_TOKEN**0.5)
        self.register_buffer("centres", torch.linspace(-1.5, 1.5, codebook_size))

    @property
    def downsample_factor(self) -> int:
        return SAMPLES_PER_TOKEN

    @property
    def groups(self) -> int:
        return 1

    def forward(self, wave: Tensor, flatten: bool = True, input_sample_hz: int | None = None) -> Tensor:
        if input_sample_hz is not None and input_sample_hz != self.target_sample_hz:
            length = round(wave.shape[-1] * self.target_sample_hz / input_sample_hz)
            wave = F.interpolate(wave[:, None], size=length, mode="linear")[:, 0]
        frames = wave[:, : wave.shape[-1] // SAMPLES_PER_TOKEN * SAMPLES_PER_TOKEN].unflatten(
            -1, (-1, SAMPLES_PER_TOKEN)
        )
        return ((frames.to(self.projection.dtype) @ self.projection)[..., None] - self.centres).abs().argmin(dim=-1)


class HubertWithKmeans(FairseqVQWav2Vec):
    """See `FairseqVQWav2Vec`: the same interface under the other name that the reference accepts."""


def get_dataloader(dataset: Any, pad_to_longest: bool = True, **kwargs: Any) -> DataLoader:
    """The batches of audiolm-pytorch's loader: a tuple even for single tensors, rows padded to the longest with 0."""

    def join(rows: tuple) -> Any:
        if isinstance(rows[0], str):
            return list(rows)
        if pad_to_longest:
            return pad_sequence(list(rows), batch_first=True)
        shortest = min(len(row) for row in rows)
        return torch.stack([row[:shortest] for row in rows])

    def collate(rows: list) -> tuple:
        columns = zip(*rows, strict=True) if isinstance(rows[0], tuple) else [tuple(rows)]
        return tuple(join(column) for column in columns)

    return DataLoader(dataset, collate_fn=collate, **kwargs)


def get_optimizer(
    parameters: Any,
    lr: float = 1e-4,
    wd: float = 1e-2,
    betas: tuple = (0.9, 0.99),
    eps: float = 1e-8,
    filter_by_requires_grad: bool = False,
    group_wd_params: bool = True,
    **_: Any,
) -> torch.optim.Optimizer:
    """Adam, or AdamW when `wd` is positive, over `parameters`."""
    chosen = [p for p in parameters if p.requires_grad or not filter_by_requires_grad]
    if wd == 0:
        return torch.optim.Adam(chosen, lr=lr, betas=betas, eps=eps)
    return torch.optim.AdamW(chosen, lr=lr, weight_decay=wd, betas=betas, eps=eps)


class ByteTokenizer:
    """`tokenize(texts) -> ids [b, t] int64`: UTF-8 bytes plus one, padded with 0."""

    vocab_size = 257

    def tokenize(self, texts: str | list[str], **_: Any) -> Tensor:
        rows = [texts] if isinstance(texts, str) else texts
        return pad_sequence([torch.tensor([byte + 1 for byte in row.encode()]) for row in rows], batch_first=True)


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


@contextmanager
def _stubs():
    """Puts the stubs in `sys.modules`, and afterwards whatever was there before."""
    stubs = {
        "audiolm_pytorch": _module(
            "audiolm_pytorch", FairseqVQWav2Vec=FairseqVQWav2Vec, HubertWithKmeans=HubertWithKmeans, __path__=[]
        ),
        "audiolm_pytorch.data": _module("audiolm_pytorch.data", get_dataloader=get_dataloader),
        "audiolm_pytorch.optimizer": _module("audiolm_pytorch.optimizer", get_optimizer=get_optimizer),
        "x_clip": _module("x_clip", __path__=[]),
        "x_clip.tokenizer": _module("x_clip.tokenizer", tokenizer=ByteTokenizer()),
    }
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_reference() -> ModuleType:
    """The package spear_tts_pytorch 0.4.8 with its progress lines off; `.spear_tts_pytorch` is its inner module.

    Raises RuntimeError when it is missing or is another version: a parity test must never be skipped for want of it.
    """
    try:
        found = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        raise RuntimeError(
            f"the parity tests need {DISTRIBUTION} {VERSION}, but {found or 'none'} is installed; run: "
            f"pip install --no-deps {DISTRIBUTION}=={VERSION} and "
            "pip install einops beartype rotary-embedding-torch accelerate packaging tqdm"
        )
    if "spear_tts_pytorch" not in sys.modules:
        with _stubs():
            importlib.import_module("spear_tts_pytorch")
    package = sys.modules["spear_tts_pytorch"]
    inner = sys.modules["spear_tts_pytorch.spear_tts_pytorch"]
    inner.tqdm = lambda steps: steps
    return package


def fake_speech_tokenizer(codebook_size: int = 20, **kwargs: Any) -> nn.Module:
    """A HubertWithKmeans that the reference's own type checks accept, whatever name this file was imported under."""
    inner = load_reference().spear_tts_pytorch
    return inner.HubertWithKmeans(codebook_size, **kwargs)


SMALL: dict[str, Any] = dict(
    dim=32, source_depth=2, target_depth=2, num_text_token_ids=13, num_semantic_token_ids=17, dim_head=8, heads=4
)


def randomise_(model: nn.Module, seed: int, spread: float = 2.2) -> nn.Module:
    """Gives every parameter but the rotary frequencies values that are neither trivial nor overwhelming.

    spread: of what the matrices make of unit vectors. Where gradients are compared it is small: sharp softmaxes, one
    after the other, make many times more of a rounding in one model than in the next, whoever computes it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("freqs") or name.startswith("wav2vec."):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("gamma"):
                value = 1 + 0.2 * noise
            elif name.startswith("token_emb"):
                value = 0.12 * noise
            elif parameter.ndim > 1 and not name.endswith("null_kv"):
                value = spread * noise / parameter.shape[-1] ** 0.5
            else:
                value = 0.5 * noise
            parameter.copy_(value.to(parameter.dtype))
    return model


def build_reference(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, spread: float = 2.2, **kwargs: Any
) -> nn.Module:
    """A small reference `TextToSemantic` in eval mode with every parameter random; `kwargs` override `SMALL`."""
    model = load_reference().TextToSemantic(**{**SMALL, **kwargs})
    return randomise_(model, seed, spread).to(dtype).eval()


def build_pair(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, spread: float = 2.2, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """`(reference, ours)`: the same sizes, ours with the reference's weights, loaded strictly; both in eval mode."""
    from spear_fast import TextToSemantic

    reference = build_reference(seed, dtype=dtype, spread=spread, **kwargs)
    ours = TextToSemantic(**{**SMALL, **kwargs}).to(dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours.eval()


def random_ids(rows: int, length: int, vocabulary: int, *, seed: int = 0, lowest: int = 1) -> Tensor:
    """ids `[rows, length]` int64 from `lowest` to `vocabulary - 1`."""
    return torch.randint(lowest, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad_rows(ids: Tensor, lengths: list[int], pad_id: int) -> Tensor:
    """`ids` with everything past each row's length replaced by `pad_id`."""
    return ids.masked_fill(torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None], pad_id)


def assert_as_exact(ours: Tensor, theirs: Tensor, truth: Tensor, *, factor: float = 2.0, floor: float = 5e-6) -> None:
    """Fails when ours is off `truth` (float64) by more than `factor` times what theirs is, plus `floor` of its size."""
    assert ours.shape == theirs.shape == truth.shape, (
        f"shapes {tuple(ours.shape)}, {tuple(theirs.shape)}, {tuple(truth.shape)}"
    )
    assert torch.isfinite(ours).all(), "ours is not finite"
    if truth.numel() == 0:
        return
    error, allowed = ((value.double() - truth.double()).abs().max().item() for value in (ours, theirs))
    bound = factor * allowed + floor * max(1.0, truth.abs().max().item())
    assert error <= bound, f"error {error:.3e} is above {bound:.3e}; the reference's own is {allowed:.3e}"


def cut_after_eos(tokens: Tensor, eos_id: int, pad_id: int) -> Tensor:
    """`tokens [b, t]` with everything past the first EOS of each row replaced by `pad_id`."""
    ended = (tokens == eos_id).cumsum(dim=-1) - (tokens == eos_id).long() > 0
    return tokens.masked_fill(ended, pad_id)
