"""`spear-fast generate`: text to speech tokens, or speech tokens to text, for people at a terminal and for pipes."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spear_fast import cli_inputs, cli_outputs
from spear_fast.cli_arguments import finite, positive
from spear_fast.cli_generation import MODALITIES, Generation
from spear_fast.cli_inputs import Input

DESCRIPTION = "Turn text into semantic speech tokens, or speech tokens into text; results come as they are finished."
STATUS = (
    "Inputs are arguments, the lines of standard input, or the rows of --file. "
    "exit status: 0 all done, 3 some inputs failed (standard error says why), 2 error, 130 interrupted"
)
DONE, ERROR, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help='text, or ids such as "12 5 7"; one input each')
    parser.add_argument("--file", type=Path, metavar="FILE", help="txt, jsonl (id; text or tokens), npy or parquet")
    parser.add_argument("--input-format", choices=cli_inputs.FORMATS, help="of --file, or of standard input (txt)")
    parser.add_argument("--model", required=True, metavar="DIR_OR_CHECKPOINT", help="model folder or checkpoint file")
    parser.add_argument(
        "--from", dest="source", choices=MODALITIES, help="what the inputs are (what the first looks like)"
    )
    parser.add_argument("--to", dest="target", choices=MODALITIES, help="what to generate (the other one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".txt, .jsonl or .npy (standard output, as txt)")
    parser.add_argument("--format", choices=cli_outputs.FORMATS, help="of the output (what --out ends in, or txt)")
    parser.add_argument(
        "--stream", action="store_true", help="write each result while it is decoded, as far as it is final"
    )
    parser.add_argument("--unordered", action="store_true", help="write each result once it is finished; use jsonl")
    search = parser.add_argument_group("decoding")
    method = search.add_mutually_exclusive_group()
    method.add_argument("--beam", type=positive, metavar="N", help="beam search with N hypotheses (4)")
    method.add_argument("--greedy", action="store_true", help="take the likeliest token")
    method.add_argument("--sample", action="store_true", help="draw tokens")
    search.add_argument("--temperature", type=finite, metavar="X", help="of sampling (1.0)")
    search.add_argument("--top-k", type=positive, metavar="N", help="draw from the N likeliest tokens")
    search.add_argument("--top-p", type=finite, metavar="X", help="draw from the likeliest tokens that hold X")
    search.add_argument("--seed", type=int, metavar="N", help="of the draws; the same seed gives the same results")
    search.add_argument("--n-best", type=positive, default=1, metavar="N", help="results of each input, best first (1)")
    search.add_argument("--max-length", type=positive, default=512, metavar="N", help="most generated tokens (512)")
    search.add_argument("--max-source", type=positive, default=2048, metavar="N", help="longer inputs fail (2048)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=positive, metavar="N", help="inputs decoded at once (32; on a GPU 128)")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (auto: cuda where there is one)")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="of weights and activations (float32); int8: weights of 8 bits, on x86 CPUs",
    )
    machine.add_argument("--threads", type=positive, metavar="N", help="threads of torch on the CPU")


def run(arguments: argparse.Namespace) -> int:
    """Generates, and returns the exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("spear-fast: interrupted; the results that are written are whole", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    if arguments.inputs and arguments.file is not None:
        raise ValueError("inputs come as arguments or from --file, got both; leave one of them out.")
    kind = cli_outputs.format_of(arguments.out, arguments.format)
    arguments.result_on_disk = arguments.out is not None
    if arguments.out is not None and not arguments.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out {arguments.out} is in a folder that does not exist; make the folder first.")
    if arguments.out is not None and arguments.file is not None and arguments.out.resolve() == arguments.file.resolve():
        raise ValueError(f"--out must be another file than --file, got {arguments.out} for both.")
    options = _options(arguments)
    _check_stream(arguments, kind)
    inputs, total = _inputs(arguments)
    # the first input tells the direction, and whether the source can be read, before a model is loaded
    first = list(itertools.islice(inputs, 1))
    if not first:
        raise ValueError("there is no input: the source is empty; give at least one text or list of ids.")
    source, target = direction(first[0], arguments.source, arguments.target)
    generation = Generation(arguments, source, target, options, total)
    try:
        with cli_outputs.opened(arguments.out, kind, arguments.n_best, stream=arguments.stream) as write:
            generation.run(itertools.chain(first, inputs), write)
    except cli_outputs.Unheard:
        return DONE
    finally:
        generation.close()
    if not generation.failed:
        return DONE
    return SOME_FAILED if generation.failed < generation.written else ERROR


def _check_stream(arguments: argparse.Namespace, kind: str) -> None:
    """Raises ValueError where results cannot be written while they are decoded."""
    if not arguments.stream:
        return
    for given, why in (
        (arguments.unordered, "--unordered: lines of several results would mix"),
        (arguments.n_best > 1, "--n-best: which result is the best is known at the end"),
        (kind != "txt", f"--format {kind}: it is written line by line as txt"),
    ):
        if given:
            raise ValueError(f"--stream does not go with {why}; leave one of them out.")


def _inputs(arguments: argparse.Namespace) -> tuple[Iterator[Input], int | None]:
    """Returns the inputs, and how many they are where that is known beforehand."""
    if arguments.file is not None:
        return cli_inputs.from_file(arguments.file, arguments.input_format), None
    if arguments.inputs and arguments.inputs != ["-"]:
        return cli_inputs.from_arguments(arguments.inputs), len(arguments.inputs)
    return cli_inputs.from_standard_input(arguments.input_format), None


def direction(first: Input, source: str | None, target: str | None) -> tuple[str, str]:
    """Returns what goes in and what comes out, "text" or "tokens" each: as given, else told by the first input."""
    if source is None and target is not None:
        source = "tokens" if target == "text" else "text"
    if source is None:
        written = first.text is not None and cli_inputs.as_ids(first.text) is None
        source = "text" if written else "tokens"
    return source, target or ("tokens" if source == "text" else "text")


def _options(arguments: argparse.Namespace) -> Any:
    from spear_fast import DecodingOptions

    method: Any = "sample" if arguments.sample else "greedy" if arguments.greedy else "beam"
    if method != "sample":
        for name in ("temperature", "top_k", "top_p", "seed"):
            if getattr(arguments, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is for draws; add --sample, or leave it out.")
    beams = arguments.beam or max(4, arguments.n_best)
    if method == "greedy" and arguments.n_best > 1:
        raise ValueError(f"--n-best must be 1 with --greedy, got {arguments.n_best}; search with --beam, or --sample.")
    if method == "beam" and arguments.n_best > beams:
        raise ValueError(f"--n-best must be at most --beam, {beams}, got {arguments.n_best}; raise --beam.")
    return DecodingOptions(
        method=method,
        beam_size=beams,
        temperature=1.0 if arguments.temperature is None else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        max_length=arguments.max_length,
        num_return_sequences=arguments.n_best,
    )
