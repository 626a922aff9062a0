"""What generates a case's batch: this package in its ways, the reference package, and peers of the same sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import t5
from benchmarks.apart import apart
from benchmarks.cases import (
    CTRANSLATE2,
    CTRANSLATE2_INT8,
    ENGINE,
    ENGINE_INT8,
    OURS,
    REFERENCE,
    STANDARD,
    TRANSFORMERS,
    TRANSFORMERS_STATIC,
    Case,
)
from benchmarks.peers import pair
from spear_fast.decoding import DecodingOptions, Weights
from spear_fast.decoding.request import Request
from spear_fast.decoding.runner import Runner
from spear_fast.decoding.step import decode_step

Variants = dict[str, Callable[[], Any]]

# what each peer is installed as
DISTRIBUTIONS = {
    REFERENCE: "spear-tts-pytorch",
    CTRANSLATE2: "ctranslate2",
    CTRANSLATE2_INT8: "ctranslate2",
    TRANSFORMERS: "transformers",
    TRANSFORMERS_STATIC: "transformers",
}


class Generation:
    """A case's models and sources on a device.

    reference: the reference package's model, or None without the package or where it is not asked for. ours: with the
        same weights. sources: `[n]` int64 for each utterance. texts: how many tokens each gets.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype = torch.float32, *, reference: bool = True
    ) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.reference, self.ours = pair(case, device=device, wanted=reference)
        self.ours = self.ours.to(dtype)
        if self.reference is not None:
            self.reference = self.reference.to(dtype)
        generator = torch.Generator().manual_seed(1)
        lengths, self.texts = case.drawn()
        whole = torch.randint(case.vocabulary, (case.batch, case.source), generator=generator)
        self.sources = [row[:length].to(device) for row, length in zip(whole, lengths, strict=True)]

    def common(self, rows: Sequence[int]) -> dict[str, Any]:
        """Returns the arguments of `generate` for some of the utterances: until the longest of their ends."""
        longest = max(self.texts[row] for row in rows)
        options: dict[str, Any] = dict(source_type="speech", target_type="text", max_length=longest)
        if self.case.beam == 1:
            # no noise: everybody then takes the likeliest token
            return options | {"temperature": 0.0}
        return options | {"beam_search_decode": True, "beam_size": self.case.beam}

    def generate(self, model: Any, rows: Sequence[int], **options: Any) -> Tensor:
        """Returns the ids of some of the utterances, of one length or padded."""
        sources = [self.sources[row] for row in rows]
        padded = nn.utils.rnn.pad_sequence(sources, batch_first=True)
        if len({len(source) for source in sources}) > 1:
            lengths = torch.tensor([len(source) for source in sources], device=self.device)
            options["source_mask"] = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        return model.generate(padded, **self.common(rows), **options)

    def batches(self) -> list[list[int]]:
        """Returns the utterances of each batch: all, or by length as many as are decoded at the same time."""
        everything = list(range(self.case.batch))
        if not self.case.ends:
            return [everything]
        ordered = sorted(everything, key=lambda row: -len(self.sources[row]))
        return [ordered[i : i + self.case.slots] for i in range(0, len(ordered), self.case.slots)]

    def own(self) -> Variants:
        """Returns this package's ways."""
        batches = self.batches()

        def decode(**options: Any) -> list[Tensor]:
            return [self.generate(self.ours, rows, **options) for rows in batches]

        found: Variants = {OURS: decode, ENGINE: self.by_engine()}
        if CTRANSLATE2_INT8 in self.case.peers and (self.device.type, self.dtype) == ("cpu", torch.float32):
            found[ENGINE_INT8] = self.by_engine(weights="int8")
        if self.case.beam > 1:
            found[STANDARD] = lambda: decode(beam_mode="standard")
        return found

    def standard(self, rows: Sequence[int]) -> list[Tensor]:
        """Returns the ids `[n]` of some of the utterances, each until its own end, by the standard search."""
        options = {"beam_mode": "standard"} if self.case.beam > 1 else {}
        batches = [[row] for row in rows] if self.case.ends else [list(rows)]
        return [tokens for batch in batches for tokens in self.generate(self.ours, batch, **options)]

    def by_engine(
        self, rows: Sequence[int] | None = None, slots: int | None = None, weights: Weights = "exact"
    ) -> Callable[..., list[Tensor]]:
        """Returns what decodes utterances, each until its own end, by one engine that is made at the first call.

        rows: all where left out. slots: decoded at the same time, of mixed utterances as many as the case says, else
        all. weights: see `TextToSemantic.engine`. It takes the most tokens of a text, no limit where left out, and
        returns `[n]` int64 ids of each, in the order of rows.
        """
        rows = range(self.case.batch) if rows is None else rows
        slots = min(len(rows), slots or (self.case.slots if self.case.ends else self.case.batch))

        @functools.cache
        def engine() -> Any:
            longest = max(len(self.sources[row]) for row in rows)
            return self.ours.engine(
                slots=slots,
                beams=self.case.beam,
                max_length=max(self.texts[row] for row in rows),
                max_source=longest,
                weights=weights,
            )

        def request(row: int, most: int) -> tuple[Tensor, DecodingOptions]:
            search: dict[str, Any] = {"method": "beam", "beam_size": self.case.beam}
            if self.case.beam == 1:
                search = {"method": "greedy"}
            return self.sources[row], DecodingOptions(**search, max_length=min(most, self.texts[row]))

        def decode(most: int = self.case.tokens) -> list[Tensor]:
            requests = [request(row, most) for row in rows]
            # everything is known at once: the engine may sort it all
            done = sorted(engine().run(requests, ahead=len(rows)), key=lambda request: request.number)
            return [request.result().tokens[0, 0] for request in done]

        return decode

    @torch.inference_mode()
    def rounding(self, rows: Sequence[int]) -> float:
        """Returns by how many nats, at most, weights of 8 bits change a first token's log-probability."""
        found = []
        for weights in ("exact", "int8"):
            decoder = self.ours.decoder("text", weights)
            memories = self.ours.encoder("speech", weights).encoded([self.sources[row] for row in rows])
            runner = Runner(decoder, slots=len(rows), beams=1, positions=2, max_source=max(map(len, memories)))
            options = DecodingOptions(method="greedy", max_length=1)
            runner.admit([Request(row, memory, options) for row, memory in zip(rows, memories, strict=True)])
            found.append(decode_step(decoder, runner.view()).log_softmax(dim=-1))
        exact, rounded = found
        best = exact.argmax(dim=-1, keepdim=True)
        return float((rounded.gather(-1, best) - exact.gather(-1, best)).abs().max())

    def peers(self, names: Sequence[str]) -> tuple[Variants, list[str]]:
        """Returns what can run here of the peers, and why the others cannot."""
        makers: Mapping[str, Callable[[], Callable[[], Any]]] = {
            REFERENCE: self._reference,
            CTRANSLATE2: lambda: self._ctranslate2("float32"),
            CTRANSLATE2_INT8: lambda: self._ctranslate2("int8_float32"),
            TRANSFORMERS: self._transformers,
            TRANSFORMERS_STATIC: lambda: self._transformers(static=True),
        }
        found, missing = {}, []
        for name in names:
            try:
                found[name] = makers[name]()
            except (ImportError, RuntimeError, ValueError) as error:
                missing.append(f"{name}: {str(error).splitlines()[0]}")
        return found, missing

    def _reference(self) -> Callable[[], Any]:
        if self.reference is None:
            raise RuntimeError("the reference package is not installed")
        return lambda: [self.generate(self.reference, rows) for rows in self.batches()]

    def _ids(self) -> list[list[int]]:
        if self.case.ends:
            return t5.asking(self.case, self.texts, [len(source) for source in self.sources])
        return [(source + t5.SPECIAL).tolist() for source in self.sources]

    def _ctranslate2(self, compute_type: str) -> Callable[[], Any]:
        threads = torch.get_num_threads()
        if self.device.type == "cuda":
            compute_type = compute_type.replace("float32", "bfloat16")
            return t5.by_ctranslate2(self.case, self._ids(), compute_type, "cuda", threads)
        return apart(t5.by_ctranslate2, self.case, self._ids(), compute_type, "cpu", threads)

    def _transformers(self, *, static: bool = False) -> Callable[[], Any]:
        model = t5.t5(self.case, self.device).to(self.dtype)
        return t5.by_transformers(self.case, model, self._ids(), self.device, static=static)
