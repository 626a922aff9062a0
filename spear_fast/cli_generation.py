"""One run of `spear-fast generate`: inputs through an engine, results to a writer, in order."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spear_fast import cli_inputs, cli_outputs
from spear_fast.cli_arguments import device_of
from spear_fast.cli_inputs import Input
from spear_fast.cli_outputs import Hypothesis

if TYPE_CHECKING:
    from spear_fast.inputs import Modality

# what the command line calls the model's two vocabularies
MODALITIES: dict[str, Modality] = {"text": "text", "tokens": "speech"}
BATCH_SIZE = {"cpu": 32, "cuda": 128}
# inputs read ahead, for each that is decoded: sources of about equal length are encoded together
AHEAD = 8


@dataclass(frozen=True)
class _Failure:
    reason: str


class Generation:
    """One run: inputs through an engine, results to a writer.

    written: inputs whose result, or failure, has been handed over. failed: how many of them failed.
    """

    def __init__(
        self, arguments: argparse.Namespace, source: str, target: str, options: Any, total: int | None
    ) -> None:
        import torch
        from tqdm import tqdm

        from spear_fast import load_model

        device = device_of(arguments.device)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        self._model = load_model(arguments.model)
        dtype = torch.float32 if arguments.dtype == "int8" else getattr(torch, arguments.dtype)
        for name, child in self._model.named_children():
            if name != "wav2vec":
                child.to(device=device, dtype=dtype)
        self._source, self._target = source, target
        if source == "text":
            _check_tokenizer(self._model)
        self._options, self._ordered = options, not arguments.unordered
        self._stream = arguments.stream
        # those whose results are not written yet, where results are written while they are decoded
        self._requests: dict[int, Any] = {}
        # torch's own generator starts with the same seed in every process
        self._seed = torch.Generator().seed() if arguments.seed is None else arguments.seed
        batch = arguments.batch_size or BATCH_SIZE.get(device.type, 32)
        slots = batch if total is None else min(batch, total)
        self._engine = self._model.engine(
            source_type=MODALITIES[source],
            target_type=MODALITIES[target],
            slots=slots,
            beams=options.hypotheses,
            max_length=options.max_length,
            max_source=arguments.max_source,
            weights="int8" if arguments.dtype == "int8" else "exact",
            # what stands beside an input must not change its result
            deterministic=True,
        )
        self._ahead = AHEAD * slots
        self._finished: deque[Any] = deque()
        self.written = self.failed = 0
        shown = sys.stderr is not None and sys.stderr.isatty()
        # on one terminal the bar would stand between the results
        shown = shown and not (arguments.out is None and sys.stdout is not None and sys.stdout.isatty())
        self._bar = tqdm(total=total, unit=" inputs", file=sys.stderr, disable=not shown)

    def run(self, inputs: Iterator[Input], write: cli_outputs.Writer) -> None:
        """Decodes the inputs as they come and writes what is finished, in their order unless told not to."""
        reader = cli_inputs.Reader(inputs, self._ahead)
        outcomes: dict[int, tuple[Input, list[Hypothesis] | _Failure]] = {}
        taken, ended = 0, False
        while not ended or self.written < taken:
            while not ended and taken - self.written < self._ahead:
                # with nothing to decode there is nothing else to do than to wait for input
                entry = reader.next(wait=taken - self.written == len(outcomes))
                if entry is None:
                    ended = reader.ended
                    break
                failure = self._submit(taken, entry)
                if failure is not None:
                    outcomes[taken] = entry, failure
                taken += 1
            if self.written + len(outcomes) < taken:
                self._engine.step()
            self._grow(write)
            while self._finished:
                request = self._finished.popleft()
                index, entry = request.tag
                outcomes[index] = entry, self._outcome(request)
            ready = sorted(outcomes) if not self._ordered else []
            while self._ordered and self.written + len(ready) in outcomes:
                ready.append(self.written + len(ready))
            for index in ready:
                self._write(write, *outcomes.pop(index))

    def _say(self, message: str) -> None:
        # without a file tqdm would write to standard output
        if sys.stderr is not None:
            self._bar.write(f"spear-fast: {message}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._engine.close()

    def _submit(self, index: int, entry: Input) -> _Failure | None:
        import torch

        if entry.problem is not None:
            return _Failure(entry.problem)
        try:
            ids = self._ids(entry)
        except ValueError as error:
            return _Failure(str(error))
        options = self._options
        if options.method == "sample":
            # of its own: an input that fails, or is left out, changes no other result
            options = replace(options, generator=torch.Generator().manual_seed((self._seed + index) % 2**63))
        request = self._engine.submit(
            ids, options, tag=(index, entry), callback=self._finished.append, stream=self._stream
        )
        if self._stream:
            self._requests[index] = request
        return None

    def _ids(self, entry: Input) -> Any:
        """Returns the ids `[n]` int64 that the engine takes, the end of sequence included. Raises ValueError."""
        import torch

        modality = MODALITIES[self._source]
        tokens = entry.tokens
        if tokens is None and self._source == "tokens":
            tokens = cli_inputs.as_ids(entry.text or "")
            if tokens is None:
                raise ValueError("the input is no list of ids, as the first one was; use --from text for all of them.")
        if tokens is None:
            tokens = self._read(entry)
        size = self._model.eos_id[modality]
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(f"ids must be from 0 to {size - 1}, got {wrong}; are they another tokenizer's?")
        end = [size] if self._model.autoset_eos_id[modality] else []
        return torch.tensor([*tokens, *end], dtype=torch.int64)

    def _read(self, entry: Input) -> list[int]:
        """Returns the ids of a text. Raises ValueError where there are none; says what the tokenizer leaves out."""
        text = entry.text or ""
        # the model's own way: without padding, and not cut
        ids = self._model.to_ids([text], "text", "source")[0].tolist()
        if not ids:
            raise ValueError("the model's tokenizer knows nothing of the text; is it another alphabet?")
        read = {i for start, stop in self._model.tokenizer.encode(text).offsets for i in range(start, stop)}
        missing = [letter for i, letter in enumerate(text) if i not in read and not letter.isspace()]
        if missing:
            self._say(f"input {entry.id}: the model's tokenizer leaves out {' '.join(dict.fromkeys(missing))}")
        return ids

    def _outcome(self, request: Any) -> list[Hypothesis] | _Failure:
        error = request.exception()
        if error is not None:
            return _Failure(" ".join(str(error).split()) or type(error).__name__)
        result = request.result()
        found = []
        for rank in range(result.tokens.shape[1]):
            length, finished = int(result.lengths[0, rank]), bool(result.finished[0, rank])
            tokens = result.tokens[0, rank, :length].tolist()
            found.append(
                Hypothesis(
                    tokens=tokens,
                    text=self._text(tokens),
                    score=float(result.scores[0, rank]),
                    mean_logprob=float(result.sum_logprobs[0, rank]) / max(1, length + finished),
                    finished=finished,
                )
            )
        return found

    def _grow(self, write: cli_outputs.Writer) -> None:
        """Writes what is final of the next result."""
        request = self._requests.get(self.written)
        if request is not None and isinstance(write, cli_outputs.StreamedLines):
            tokens = request.stream.after(0)[0]
            write.grow(tokens, self._text(tokens))

    def _text(self, tokens: list[int]) -> str | None:
        """Returns the text of generated tokens; None of speech tokens, and where the model has no tokenizer."""
        tokenizer = self._model.tokenizer if self._target == "text" else None
        return None if tokenizer is None else tokenizer.decode(tokens)

    def _write(self, write: cli_outputs.Writer, entry: Input, outcome: list[Hypothesis] | _Failure) -> None:
        self._requests.pop(self.written, None)
        self.written += 1
        self._bar.update()
        if isinstance(outcome, _Failure):
            self.failed += 1
            self._say(f"input {entry.id} failed: {outcome.reason}")
            write(entry.id, [])
        else:
            write(entry.id, outcome)


def _check_tokenizer(model: Any) -> None:
    if model.tokenizer is None:
        raise ValueError("the model has no text tokenizer to read text with; give a model folder with tokenizer.json.")
