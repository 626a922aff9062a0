"""A small speech tokenizer: cepstra of each utterance, normalised, to the nearest of k centres.

It stands where the paper has w2v-BERT and k-means. Normalising every coefficient over the utterance takes out the
speaker's average spectrum and the channel, which is most of what differs between voices.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from spear_fast.speech.audio import Samples, resample

CONFIG_NAME = "speech_tokenizer.json"
CENTRES_NAME = "speech_tokenizer.safetensors"
FRAME_SHIFT_MS = 10
PAD_ID = -1
# fixed noise under every sound, this far below it: the logarithm of digital silence would tell files apart, not sounds
NOISE_DECIBELS = 50.0
# sample rates and all else are below
LARGEST_SETTING = 1_000_000
SETTINGS = ("sample_rate", "frames_per_token", "num_ceps", "num_mels", "order_decay", "slope_weight")

Features = npt.NDArray[np.float32]


class MelKMeansTokenizer(nn.Module):
    """Mel cepstra and their slopes over `frames_per_token` frames of 10 ms, quantised by k-means.

    centres: `[codebook_size, features]`, float32. sample_rate: Hz of the sound that `encode` takes.
    A module, so that it serves as the `wav2vec` of a `TextToSemantic`; it adds nothing to the state dict.
    """

    centres: Tensor

    def __init__(
        self,
        centres: Tensor,
        *,
        sample_rate: int = 16000,
        frames_per_token: int = 3,
        num_ceps: int = 13,
        num_mels: int = 40,
        order_decay: float = 0.15,
        slope_weight: float = 0.5,
    ) -> None:
        super().__init__()
        counts = dict(sample_rate=sample_rate, frames_per_token=frames_per_token, num_ceps=num_ceps, num_mels=num_mels)
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LARGEST_SETTING:
                raise ValueError(f"{name} must be a whole number from 1 to {LARGEST_SETTING}, got {count!r}.")
        if num_ceps > num_mels:
            raise ValueError(f"num_ceps must be at most num_mels {num_mels}, got {num_ceps}.")
        for name, weight in (("order_decay", order_decay), ("slope_weight", slope_weight)):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= LARGEST_SETTING:
                raise ValueError(f"{name} must be a number from 0 to {LARGEST_SETTING}, got {weight!r}.")
        self.sample_rate = self.target_sample_hz = sample_rate
        self.frames_per_token = frames_per_token
        self.num_ceps = num_ceps
        self.num_mels = num_mels
        self.order_decay = order_decay
        self.slope_weight = slope_weight
        wanted = 2 * num_ceps
        if centres.ndim != 2 or centres.shape[1] != wanted or not len(centres):
            raise ValueError(f"centres must have shape [codebook size, {wanted}], got {list(centres.shape)}.")
        self.register_buffer("centres", centres.float(), persistent=False)

    @property
    def codebook_size(self) -> int:
        return self.centres.shape[0]

    @property
    def tokens_per_second(self) -> float:
        return 1000 / (FRAME_SHIFT_MS * self.frames_per_token)

    @classmethod
    def fit(cls, features: Features, codebook_size: int, *, seed: int = 0, **settings: Any) -> MelKMeansTokenizer:
        """Returns a tokenizer with centres fitted to `features` `[n, dim]`, which `features_of` gives."""
        from sklearn.cluster import MiniBatchKMeans

        kmeans = MiniBatchKMeans(codebook_size, batch_size=8192, n_init=3, max_iter=100, random_state=seed)
        return cls(torch.from_numpy(kmeans.fit(features).cluster_centers_), **settings)

    def features_of(self, samples: Samples) -> Features:
        """Returns what is quantised, `[tokens, 2 * num_ceps]`: cepstra and slopes, each of mean 0.

        Each has the same variance first, then cepstrum i is divided by `1 + order_decay * i`, and the slopes are
        multiplied by `slope_weight`: higher orders tell voices apart rather than sounds.

        samples: `[n]`, mono, at `sample_rate`. A sound shorter than one token gives no rows.
        Raises ValueError where the samples are so far from -1 to 1 that features are not finite.
        """
        import kaldi_native_fbank as knf

        options = knf.MfccOptions()
        options.frame_opts.samp_freq = self.sample_rate
        options.frame_opts.frame_shift_ms = FRAME_SHIFT_MS
        # its noise would make tokens differ from run to run
        options.frame_opts.dither = 0.0
        options.mel_opts.num_bins = self.num_mels
        options.num_ceps = self.num_ceps
        options.use_energy = False
        extractor = knf.OnlineMfcc(options)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._features(extractor, samples)

    def _features(self, extractor: Any, samples: Samples) -> Features:
        noise = np.random.default_rng(0).standard_normal(len(samples), dtype=np.float32)
        loudness = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
        noisy = samples + noise * np.float32(loudness * 10 ** (-NOISE_DECIBELS / 20))
        # the scale that the extractor's energy floor is meant for
        extractor.accept_waveform(self.sample_rate, (noisy * np.float32(32768.0)).tolist())
        extractor.input_finished()
        count = extractor.num_frames_ready
        tokens = count // self.frames_per_token
        if not tokens:
            return np.zeros((0, 2 * self.num_ceps), dtype=np.float32)
        cepstra = np.stack([extractor.get_frame(frame) for frame in range(count)])
        padded = np.pad(cepstra, ((2, 2), (0, 0)), mode="edge")
        slopes = (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10
        frames = np.concatenate((cepstra, slopes), axis=1)[: tokens * self.frames_per_token]
        if not np.isfinite(frames).all():
            raise ValueError(
                f"the sound gives features that are not finite: its samples go up to {np.abs(samples).max():g}, wanted "
                "about -1 to 1; export it again."
            )
        pooled = frames.reshape(tokens, self.frames_per_token, -1).mean(axis=1)
        normal = (pooled - pooled.mean(axis=0)) / np.maximum(pooled.std(axis=0), 1e-3)
        weights = 1 / (1 + self.order_decay * np.arange(self.num_ceps))
        return np.asarray(normal * np.concatenate((weights, self.slope_weight * weights)), dtype=np.float32)

    def quantise(self, features: Features) -> npt.NDArray[np.int64]:
        """Returns the index of the centre nearest to each row of `features` `[n, 2 * num_ceps]`."""
        rows = torch.from_numpy(features).to(self.centres.device)
        return torch.cdist(rows[None], self.centres[None])[0].argmin(dim=-1).cpu().numpy()

    def encode(self, samples: Samples) -> npt.NDArray[np.int64]:
        """Returns the tokens `[n]` of a mono sound at `sample_rate`."""
        return self.quantise(self.features_of(samples))

    @torch.no_grad()
    def forward(self, wave: Tensor, flatten: bool = True, input_sample_hz: int | None = None) -> Tensor:
        """Returns ids `[batch, tokens]`, int64, shorter rows padded at the end with -1.

        wave: `[batch, samples]` float, mono, at `input_sample_hz` Hz (default: `sample_rate`).
        flatten: taken for the interface of audiolm-pytorch's tokenizers; there is one id a step either way.
        """
        rate = self.sample_rate if input_sample_hz is None else input_sample_hz
        sounds = wave.detach().cpu().float().numpy()
        rows = [torch.from_numpy(self.encode(resample(sound, rate, self.sample_rate))) for sound in sounds]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID).to(wave.device)

    def settings(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in SETTINGS}

    def fingerprint(self) -> str:
        """Returns a hex SHA-256 over settings and centres."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        digest.update(self.centres.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes `speech_tokenizer.json` and `speech_tokenizer.safetensors` into `folder`, which must exist."""
        folder = Path(folder)
        (folder / CONFIG_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")
        save_file({"centres": self.centres.cpu().contiguous()}, folder / CENTRES_NAME)
        # it is written for its owner alone; this is as readable as the file beside it
        (folder / CENTRES_NAME).chmod((folder / CONFIG_NAME).stat().st_mode & 0o777)

    @classmethod
    def load(cls, folder: str | Path) -> MelKMeansTokenizer:
        """Returns the tokenizer that `save` wrote. Raises FileNotFoundError or ValueError."""
        folder = Path(folder)
        for name in (CONFIG_NAME, CENTRES_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}; a speech tokenizer needs it.")
        try:
            settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            centres = load((folder / CENTRES_NAME).read_bytes())["centres"]
            return cls(centres, **settings)
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"the speech tokenizer in {folder} is damaged ({error}); copy it again.") from error
