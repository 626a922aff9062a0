"""The command line: `spear-fast label | generate | info | import-pt | export-pt | bench`.

Results go to standard output, progress and errors to standard error. Exit status: 0 all done; 3 done, but some rows
failed (see failed.jsonl); 2 nothing could be done; 130 or 143 interrupted, to be resumed with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from spear_fast.cli_arguments import device_of, finite, positive

EXIT_DONE, EXIT_ERROR, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130
# what `bench` measures
BENCHMARKS = ("op", "generate", "step", "label", "train", "compare")

STATUS = "exit status: 0 all done, 3 some rows failed (failed.jsonl says which and why), 2 error, 130 interrupted"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"spear-fast: error: {message}; see {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; only `--debug` shows tracebacks."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # whoever read our output has left; keep the interpreter from saying so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def _run(argv: list[str]) -> int:
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    arguments.argv = argv
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _stopped(arguments, "stopped at once", EXIT_INTERRUPTED)
    except Exception as error:
        if arguments.debug:
            raise
        message = _message(error)
        if getattr(arguments, "json", False):
            print(json.dumps({"event": "error", "message": message}), flush=True)
        print(f"spear-fast: error: {message}", file=sys.stderr)
        return EXIT_ERROR


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs the package {error.name}; install it with: pip install 'spear-fast[label]'."
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, FileNotFoundError)) and text:
        return text
    if isinstance(error, OSError):
        return f"{error.strerror or text}{f' ({error.filename})' if error.filename else ''}."
    return f"unexpected {type(error).__name__}: {text or 'no message'}; run again with --debug to see where."


def _stopped(arguments: argparse.Namespace, progress: str, status: int) -> int:
    if getattr(arguments, "json", False):
        print(json.dumps({"event": "interrupted", "message": progress}), flush=True)
    print(f"spear-fast: {progress}; go on with: {shlex.join(['spear-fast', *arguments.argv])}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    from spear_fast import __version__

    parser = _Parser(prog="spear-fast", description="SPEAR-TTS: text and semantic speech tokens.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"spear-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_label(commands)
    _add_generate(commands)
    _add_info(commands)
    _add_import(commands)
    _add_export(commands)
    _add_bench(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_label(commands: Any) -> None:
    text = "Label speech with text: audio or semantic tokens in, Parquet shards out; run it again to resume."
    parser = _command(commands, "label", run_label, text, STATUS)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="audio file or folder of them (wav, flac, ogg, mp3), manifest (csv or jsonl: id, audio), or token file "
        "(Parquet or jsonl: id, tokens)",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR_OR_CHECKPOINT", help="model folder, or .safetensors or .pt"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; one that was begun is gone on with")
    search = parser.add_argument_group("search")
    search.add_argument("--beam-size", type=positive, default=4, metavar="N")
    search.add_argument("--max-length", type=positive, default=512, metavar="N", help="tokens of a label (512)")
    search.add_argument("--length-penalty", type=finite, default=1.0, metavar="X", help="exponent of the length (1.0)")
    search.add_argument(
        "--early-stopping",
        choices=("true", "false", "never"),
        default="false",
        help="stop a search at the first full pool, by an estimate (default), or only when nothing can improve",
    )
    search.add_argument(
        "--repetition-penalty", type=finite, default=1.0, metavar="X", help="above 1: less of what was said (1.0)"
    )
    search.add_argument(
        "--no-repeat-ngram-size", type=int, default=0, metavar="N", help="no n tokens come twice (0: may)"
    )
    search.add_argument(
        "--coverage-penalty", type=finite, default=0.0, metavar="X", help="against skipped speech, at the end (0.0)"
    )
    size = parser.add_argument_group("sizes")
    size.add_argument("--max-source-tokens", type=positive, default=4096, metavar="N", help="longer ones fail (4096)")
    size.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="source tokens that are worked on together, taken as 256 an utterance (8192; on a GPU 65536); on a CPU of "
        "many cores 4096 for each of them keep all busy",
    )
    shards = size.add_mutually_exclusive_group()
    shards.add_argument("--num-shards", type=positive, metavar="N", help="files to write")
    shards.add_argument("--rows-per-shard", type=positive, metavar="N", help="rows of a file (512; on a GPU 4096)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (auto: cuda where there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="float32")
    machine.add_argument("--threads", type=positive, metavar="N", help="threads of torch on the CPU")
    machine.add_argument("--workers", type=positive, metavar="N", help="threads that read and tokenize audio")
    parser.add_argument("--retry-failed", action="store_true", help="label the shards that hold failed rows again")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print events and the summary as JSON lines")


def run_label(arguments: argparse.Namespace) -> int:
    """Labels; see `spear_fast.labelling.label`."""
    import torch

    from spear_fast.checkpoints.load import load_model
    from spear_fast.labelling import Interrupted, LabelOptions, label
    from spear_fast.labelling.options import DEFAULT_BATCH_TOKENS, DEFAULT_ROWS_PER_SHARD
    from spear_fast.labelling.progress import make_reporter
    from spear_fast.labelling.stopping import StopSignal

    device = device_of(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = LabelOptions(
        beam_size=arguments.beam_size,
        length_penalty=arguments.length_penalty,
        early_stopping="never" if arguments.early_stopping == "never" else arguments.early_stopping == "true",
        repetition_penalty=arguments.repetition_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        coverage_penalty=arguments.coverage_penalty,
        max_length=arguments.max_length,
        max_source_tokens=arguments.max_source_tokens,
        batch_tokens=arguments.batch_tokens or DEFAULT_BATCH_TOKENS.get(device.type, 8192),
        num_shards=arguments.num_shards,
        rows_per_shard=arguments.rows_per_shard or DEFAULT_ROWS_PER_SHARD.get(device.type, 512),
        device=str(device),
        dtype=arguments.dtype,
    )
    model = load_model(arguments.model)
    stop = StopSignal()
    report = make_reporter(quiet=arguments.quiet, as_json=arguments.json)
    try:
        with stop.listening():
            summary = label(
                arguments.sources,
                model,
                arguments.out,
                options,
                report=report,
                stop=stop,
                workers=arguments.workers,
                retry_failed=arguments.retry_failed,
                about={"model": str(Path(arguments.model).resolve()), "device": str(device)},
            )
    except Interrupted as interrupted:
        report.close()
        return _stopped(arguments, interrupted.progress, 128 + stop.signal)
    finally:
        report.close()
    if not arguments.quiet and not arguments.json:
        print(summary.text(Path(arguments.out)))
    return EXIT_SOME_FAILED if summary.failed else EXIT_DONE


def _add_generate(commands: Any) -> None:
    from spear_fast import cli_generate

    parser = _command(commands, "generate", cli_generate.run, cli_generate.DESCRIPTION, cli_generate.STATUS)
    cli_generate.add_arguments(parser)


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", run_info, "Show versions, devices, and what runs each operation.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_info(arguments: argparse.Namespace) -> int:
    """Prints what this installation can do."""
    from spear_fast.environment import describe, describe_text

    facts = describe()
    print(json.dumps(facts, indent=1) if arguments.json else describe_text(facts))
    return EXIT_DONE


def _add_import(commands: Any) -> None:
    text = "Turn the reference's folder of .pt rows into a folder of labels."
    parser = _command(commands, "import-pt", run_import, text, STATUS)
    parser.add_argument("folder", metavar="FOLDER", help="folder of .pt files: speech ids, -1, text ids")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--model", metavar="DIR_OR_CHECKPOINT", help="the model that made the rows, for its sizes; or:")
    parser.add_argument("--num-speech-ids", type=positive, metavar="N", help="its num_semantic_token_ids")
    parser.add_argument("--num-text-ids", type=positive, metavar="N", help="its num_text_token_ids")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run_import(arguments: argparse.Namespace) -> int:
    """Imports; see `spear_fast.labelling.import_rows`."""
    from spear_fast.checkpoints.load import load_model
    from spear_fast.labelling.rows_pt import RowFormat, import_rows

    sizes = (arguments.num_speech_ids, arguments.num_text_ids)
    if arguments.model is None and None in sizes:
        raise ValueError("import-pt needs --model, or both --num-speech-ids and --num-text-ids, for the model's sizes.")
    if arguments.model is None:
        row_format = RowFormat(num_speech_ids=sizes[0], num_text_ids=sizes[1])
    else:
        row_format = RowFormat.of_model(load_model(arguments.model))
    totals = import_rows(arguments.folder, arguments.out, row_format)
    if not arguments.quiet:
        failed = f", {totals.failed} failed (see {Path(arguments.out) / 'failed.jsonl'})" if totals.failed else ""
        print(f"{totals.rows} rows imported into {arguments.out}{failed}")
    return EXIT_SOME_FAILED if totals.failed else EXIT_DONE


def _add_export(commands: Any) -> None:
    text = "Write a folder of labels as the reference's folder of .pt rows."
    parser = _command(commands, "export-pt", run_export, text)
    parser.add_argument("folder", metavar="DIR", help="folder of labels")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run_export(arguments: argparse.Namespace) -> int:
    """Exports; see `spear_fast.labelling.export_rows`."""
    from spear_fast.labelling.rows_pt import export_rows

    count = export_rows(arguments.folder, arguments.out)
    if not arguments.quiet:
        print(f"{count} rows written to {arguments.out}")
    return EXIT_DONE


def _add_bench(commands: Any) -> None:
    text = "Measure ops, generation, labelling or training on this machine, by their distance from its limits."
    parser = _command(commands, "bench", run_bench, text, "spear-fast bench WHAT --help lists the options of each")
    parser.add_argument("what", choices=BENCHMARKS, metavar="|".join(BENCHMARKS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs a benchmark of the checkout; see `benchmarks/`."""
    import importlib

    # peers, the tests' rule of what is right and rows come with a checkout: none of it belongs into a user's install
    places = [Path(__file__).resolve().parent.parent, Path.cwd()]
    checkout = next((place for place in places if (place / "benchmarks" / "operations").is_dir()), None)
    if checkout is None:
        raise ValueError(
            "bench runs from a checkout, since cases, peers and the rule of what is right are not installed; "
            "run it in the folder of a clone of spear_fast."
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(f"benchmarks.{arguments.what}").main(arguments.options)
    except SystemExit as stop:
        return int(stop.code or 0)
