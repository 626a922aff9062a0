"""`spear-fast label`, `import-pt` and `export-pt`: audio or tokens, or the reference's rows, to folders of labels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spear_fast.cli_arguments import devices_of, finite, positive
from spear_fast.cli_streams import say_stopped

EXIT_DONE, EXIT_SOME_FAILED = 0, 3
STATUS = "exit status: 0 all done, 3 some rows failed (failed.jsonl says which and why), 2 error, 130 interrupted"
LABEL = "Label speech with text: audio or semantic tokens in, Parquet shards out; run it again to resume."
IMPORT = "Turn the reference's folder of .pt rows into a folder of labels."
EXPORT = "Write a folder of labels as the reference's folder of .pt rows."
# more than any machine has, and few enough to be started
MOST_THREADS = 1024
NO_LOCK = "do without a lock on DIR, for file systems that have none; see to it that no other job writes there"


def threads(text: str) -> int:
    """Returns a number of threads; argparse says what is wrong with anything else."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_THREADS}, got {text!r}")
    return value


def add_label(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `label`."""
    add_job(parser, needed=False)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="without SOURCE: shards I, I + N, … of what spear-fast plan wrote to DIR (by default what Slurm's arrays "
        "or RANK and WORLD_SIZE say, else all)",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="label on a Ray cluster, by default that of RAY_ADDRESS or of this machine; give SOURCE before it",
    )
    parser.add_argument(
        "--ray-actors", type=positive, metavar="N", help="processes there (as many as there is room for)"
    )
    parser.add_argument("--ray-gpus", type=finite, metavar="X", help="GPUs of each (1 for a plan for GPUs, else 0)")
    parser.add_argument("--threads", type=threads, metavar="N", help="threads of torch on the CPU")
    parser.add_argument("--workers", type=threads, metavar="N", help="threads that read and tokenize audio")
    parser.add_argument("--retry-failed", action="store_true", help="label the shards that hold failed rows again")
    parser.add_argument(
        "--relabel-changed", action="store_true", help="label the shards again whose tokens or audio have changed"
    )
    parser.add_argument("--no-lock", action="store_true", help=NO_LOCK)
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print events and the summary as JSON lines")


def add_job(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """Adds what makes a job; needed: whether sources and a model are, or may be in a plan."""
    before = {action.dest for action in parser._actions}
    parser.add_argument(
        "sources",
        nargs="+" if needed else "*",
        metavar="SOURCE",
        help="audio file or folder of them (wav, flac, ogg, mp3, opus, …), manifest (csv or jsonl: id, audio, and for "
        "segments offset and duration in seconds), token file (Parquet or jsonl: id, tokens) or folder of Parquet",
    )
    parser.add_argument(
        "--model", required=needed, metavar="DIR_OR_CHECKPOINT", help="model folder, or .safetensors or .pt"
    )
    parser.add_argument("--out", required=needed, metavar="DIR", help="output folder; resumes an unfinished job in it")
    search = parser.add_argument_group("search")
    search.add_argument("--beam-size", type=positive, default=4, metavar="N", help="hypotheses of each utterance (4)")
    search.add_argument("--max-length", type=positive, default=512, metavar="N", help="most tokens of a label (512)")
    search.add_argument("--length-penalty", type=finite, default=1.0, metavar="X", help="exponent of the length (1.0)")
    search.add_argument(
        "--early-stopping",
        choices=("true", "false", "never"),
        default="false",
        help="stop a search once enough hypotheses have ended (true), once the best unfinished one is no better "
        "(false, the default), or only when none can become better (never)",
    )
    search.add_argument(
        "--repetition-penalty",
        type=finite,
        default=1.0,
        metavar="X",
        help="above 1: tokens recur less often (1.0)",
    )
    search.add_argument(
        "--no-repeat-ngram-size", type=int, default=0, metavar="N", help="no run of N tokens comes twice (0: no ban)"
    )
    search.add_argument(
        "--coverage-penalty", type=finite, default=0.0, metavar="X", help="against skipped speech; ranks the beam (0.0)"
    )
    size = parser.add_argument_group("sizes")
    size.add_argument(
        "--max-source-tokens", type=positive, default=4096, metavar="N", help="a longer utterance fails (4096)"
    )
    size.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="source tokens that are worked on together, taken as 256 an utterance (8192; on a GPU 65536); a CPU of "
        "many cores needs 4096 for each",
    )
    shards = size.add_mutually_exclusive_group()
    shards.add_argument("--num-shards", type=positive, metavar="N", help="files to write")
    shards.add_argument("--rows-per-shard", type=positive, metavar="N", help="rows of a file (512; on a GPU 4096)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, … (auto: cuda where there is one); several, as cuda:0,cuda:1, or all: label with a "
        "process for each",
    )
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="float32")
    machine.add_argument(
        "--kv-dtype",
        choices=("exact", "fp8"),
        default="exact",
        help="of cross-attention's keys and values: fp8 takes 8 bits for each, for GPUs (exact)",
    )
    own = {action.dest: action for action in parser._actions if action.dest not in before}
    # what a plan says
    planned = {name: action for name, action in own.items() if name not in ("sources", "model", "out", "device")}
    parser.set_defaults(planned={name: (action.option_strings[0], action.default) for name, action in planned.items()})


def run_label(arguments: argparse.Namespace) -> int:
    """Labels; see `spear_fast.labelling.label`."""
    import torch

    from spear_fast.checkpoints.load import load_model
    from spear_fast.cli_parts import part_job, planned_device, sources_on_many
    from spear_fast.labelling import Interrupted, label
    from spear_fast.labelling.errors import readable
    from spear_fast.labelling.progress import make_reporter
    from spear_fast.labelling.stopping import StopSignal

    _check_complete(arguments)
    on_ray = arguments.ray is not None
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    run: Callable[..., Any]
    if arguments.sources:
        if arguments.shard is not None:
            raise ValueError("--shard is for a job that was planned; write spear-fast plan SOURCE... --out DIR first.")
        devices = [planned_device(arguments)] if on_ray else devices_of(arguments.device)
        options = options_of(arguments, devices[0])
        about = {"model": readable(str(Path(arguments.model).resolve())), "device": ",".join(map(str, devices))}
        model = load_model(arguments.model)
        label_all = label if len(devices) == 1 and not on_ray else sources_on_many(arguments, devices)
        run = partial(label_all, arguments.sources, model, arguments.out, options, about=about)
    else:
        run = part_job(arguments)
    stop = StopSignal()
    report = make_reporter(quiet=arguments.quiet, as_json=arguments.json)
    try:
        with stop.listening():
            summary = run(
                report=report,
                stop=stop,
                workers=arguments.workers,
                retry_failed=arguments.retry_failed,
                relabel_changed=arguments.relabel_changed,
                lock=not arguments.no_lock,
            )
    except Interrupted as interrupted:
        report.close()
        return say_stopped(arguments, interrupted.progress, 128 + stop.signal)
    except Exception as error:
        if stop.at_once:
            # libraries turn the second signal into errors of their own
            raise KeyboardInterrupt from error
        raise
    finally:
        report.close()
    if not arguments.quiet and not arguments.json:
        print(readable(summary.text(Path(arguments.out))))
    return EXIT_SOME_FAILED if summary.failed else EXIT_DONE


def _check_complete(arguments: argparse.Namespace) -> None:
    """Raises ValueError when an argument is missing: a plan in DIR stands for sources and model."""
    given = {"SOURCE": arguments.sources, "--model": arguments.model, "--out": arguments.out}
    if arguments.out is None or (arguments.sources and arguments.model is None):
        missing = ", ".join(name for name, value in given.items() if not value)
        raise ValueError(f"the following arguments are required: {missing}; see spear-fast label --help.")


def options_of(arguments: argparse.Namespace, device: Any) -> Any:
    """Returns the `LabelOptions` of a command line."""
    from spear_fast.labelling import LabelOptions
    from spear_fast.labelling.options import DEFAULT_BATCH_TOKENS, DEFAULT_ROWS_PER_SHARD

    return LabelOptions(
        beam_size=arguments.beam_size,
        length_penalty=arguments.length_penalty,
        early_stopping="never" if arguments.early_stopping == "never" else arguments.early_stopping == "true",
        repetition_penalty=arguments.repetition_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        coverage_penalty=arguments.coverage_penalty,
        max_length=arguments.max_length,
        max_source_tokens=arguments.max_source_tokens,
        batch_tokens=arguments.batch_tokens or DEFAULT_BATCH_TOKENS[device.type],
        num_shards=arguments.num_shards,
        rows_per_shard=arguments.rows_per_shard or DEFAULT_ROWS_PER_SHARD[device.type],
        device=str(device),
        dtype=arguments.dtype,
        kv_dtype=arguments.kv_dtype,
    )


def add_import(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `import-pt`."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of .pt files: speech ids, -1, text ids")
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; resumes an unfinished import in it")
    parser.add_argument("--model", metavar="DIR_OR_CHECKPOINT", help="the model that made the rows, for its sizes; or:")
    parser.add_argument("--num-speech-ids", type=positive, metavar="N", help="its num_semantic_token_ids")
    parser.add_argument("--num-text-ids", type=positive, metavar="N", help="its num_text_token_ids")
    parser.add_argument(
        "--relabel-changed", action="store_true", help="write the shards again whose rows have changed since"
    )
    parser.add_argument("--no-lock", action="store_true", help=NO_LOCK)
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run_import(arguments: argparse.Namespace) -> int:
    """Imports; see `spear_fast.labelling.import_rows`."""
    from spear_fast.checkpoints.load import load_model
    from spear_fast.labelling.errors import readable
    from spear_fast.labelling.rows_pt import RowFormat, import_rows

    sizes = (arguments.num_speech_ids, arguments.num_text_ids)
    if arguments.model is None and None in sizes:
        raise ValueError("import-pt needs --model, or both --num-speech-ids and --num-text-ids, for the model's sizes.")
    if arguments.model is None:
        row_format = RowFormat(num_speech_ids=sizes[0], num_text_ids=sizes[1])
    else:
        row_format = RowFormat.of_model(load_model(arguments.model))
    totals = import_rows(
        arguments.folder,
        arguments.out,
        row_format,
        relabel_changed=arguments.relabel_changed,
        lock=not arguments.no_lock,
    )
    if not arguments.quiet:
        failed = f", {totals.failed} failed (see {Path(arguments.out) / 'failed.jsonl'})" if totals.failed else ""
        print(readable(f"{totals.rows} rows imported into {arguments.out}{failed}"))
    return EXIT_SOME_FAILED if totals.failed else EXIT_DONE


def add_export(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `export-pt`."""
    parser.add_argument("folder", metavar="DIR", help="folder of labels")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the rows")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def run_export(arguments: argparse.Namespace) -> int:
    """Exports; see `spear_fast.labelling.export_rows`."""
    from spear_fast.labelling.errors import readable
    from spear_fast.labelling.rows_pt import export_rows

    count = export_rows(arguments.folder, arguments.out)
    if not arguments.quiet:
        print(readable(f"{count} rows written to {arguments.out}"))
    return EXIT_DONE
