"""The command line: `spear-fast label | plan | finish | generate | info | import-pt | export-pt | bench`.

Results go to standard output, progress and errors to standard error. Exit status: 0 all done; 3 done, but some rows
failed (see failed.jsonl); 2 nothing could be done; 130 or 143 interrupted, the same command resumes. A stream that is
closed or full is not written to: labelling goes on, and a command whose result goes there ends with 2.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from spear_fast import cli_generate, cli_label, cli_parts
from spear_fast.cli_streams import quiet_streams, say_stopped

EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED = 0, 2, 130
# what `bench` measures
BENCHMARKS = ("op", "generate", "step", "latency", "label", "train", "scale", "compare")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"spear-fast: error: {message}; see {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; only `--debug` shows tracebacks."""
    with quiet_streams() as (output, errors):
        try:
            arguments, status = _run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            # one more, in the midst of the closing words
            arguments, status = None, EXIT_INTERRUPTED
        output.flush()
        if output.failed is not None and status == EXIT_DONE and not getattr(arguments, "result_on_disk", False):
            status = EXIT_ERROR
            # a reader that has left needs no words
            if not isinstance(output.failed, BrokenPipeError):
                print(f"spear-fast: error: cannot write to standard output: {_message(output.failed)}", file=errors)
    if argv is None:
        # what is pressed while the interpreter exits has nothing left to stop
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def _run(argv: list[str]) -> tuple[argparse.Namespace | None, int]:
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:
        return None, int(stop.code or 0)
    arguments.argv = argv
    try:
        return arguments, arguments.run(arguments)
    except KeyboardInterrupt:
        return arguments, say_stopped(arguments, "stopped at once", EXIT_INTERRUPTED)
    except Exception as error:
        if arguments.debug:
            raise
        message = _message(error)
        if getattr(arguments, "json", False):
            print(json.dumps({"event": "error", "message": message}), flush=True)
        print(f"spear-fast: error: {message}", file=sys.stderr)
        return arguments, EXIT_ERROR


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = "ray" if (error.name or "").partition(".")[0] == "ray" else "label"
        return f"this command needs the package {error.name}; install it with: pip install 'spear-fast[{extra}]'."
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, FileNotFoundError)) and text:
        return text
    if isinstance(error, MemoryError):
        return f"memory ran out: {text or 'there is not enough of it'}"
    if isinstance(error, OSError):
        return f"{error.strerror or text}{f' ({error.filename})' if error.filename else ''}."
    return f"unexpected {type(error).__name__}: {text or 'no message'}; run again with --debug to see where."


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    from spear_fast import __version__

    parser = _Parser(prog="spear-fast", description="SPEAR-TTS: text and semantic speech tokens.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"spear-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_folders_of_labels(commands)
    _add_generate(commands)
    _add_info(commands)
    _add_bench(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_folders_of_labels(commands: Any) -> None:
    for name, run, add, text, status in (
        ("label", cli_label.run_label, cli_label.add_label, cli_label.LABEL, cli_label.STATUS),
        ("plan", cli_parts.run_plan, cli_parts.add_plan, cli_parts.PLAN, None),
        ("finish", cli_parts.run_finish, cli_parts.add_finish, cli_parts.FINISH, cli_label.STATUS),
        ("import-pt", cli_label.run_import, cli_label.add_import, cli_label.IMPORT, cli_label.STATUS),
        ("export-pt", cli_label.run_export, cli_label.add_export, cli_label.EXPORT, None),
    ):
        parser = _command(commands, name, run, text, status)
        parser.set_defaults(result_on_disk=True)
        add(parser)


def _add_generate(commands: Any) -> None:
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


def _add_bench(commands: Any) -> None:
    text = "Measure ops, generation, labelling or training on this machine, by their share of the roofline."
    parser = _command(commands, "bench", run_bench, text, "spear-fast bench WHAT --help lists the options of each")
    parser.add_argument("what", choices=BENCHMARKS, metavar="|".join(BENCHMARKS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs a benchmark of the checkout; see `benchmarks/`."""
    import importlib

    # peers, the tests' rule of what is right and rows come with a checkout: none of it belongs into a user's install
    folders = [Path(__file__).resolve().parent.parent, Path.cwd()]
    checkout = next((folder for folder in folders if (folder / "benchmarks" / "operations").is_dir()), None)
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
