"""`spear-fast plan` and `finish`, and the part of a plan that `spear-fast label` does."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spear_fast.cli_arguments import device_of, devices_of
from spear_fast.cli_label import EXIT_DONE, EXIT_SOME_FAILED, NO_LOCK, add_job, options_of

PLAN = "List what is to be labelled once, for any number of machines that label a part each."
FINISH = "Check that all that was planned is labelled, and write manifest and card."


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `plan`."""
    add_job(parser, needed=True)
    parser.add_argument("--no-lock", action="store_true", help=NO_LOCK)
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def add_finish(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `finish`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder that was planned and labelled")
    parser.add_argument("--no-lock", action="store_true", help=NO_LOCK)
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def part_job(arguments: argparse.Namespace) -> Callable[..., Any]:
    """Returns what labels a part of a plan."""
    from spear_fast.checkpoints.load import load_model
    from spear_fast.labelling.parts import label_part, part_of
    from spear_fast.labelling.planning import read_plan

    planned = read_plan(Path(arguments.out))
    given = [flag for name, (flag, default) in arguments.planned.items() if getattr(arguments, name) != default]
    if given:
        raise ValueError(f"{', '.join(given)} stand in the plan of {arguments.out} already; leave them out.")
    path = arguments.model or planned.model
    if path is None:
        raise ValueError("the plan does not say where the model is; give it with --model.")
    if arguments.ray is not None:
        if arguments.shard is not None or arguments.device != "auto":
            raise ValueError("--shard and --device are not for --ray: its actors do all shards, on the plan's device.")
        return partial(_label_on_ray(arguments), arguments.out, path)
    part = part_of(arguments.shard, os.environ)
    named = _device_name(planned.options.device) if arguments.device == "auto" else arguments.device
    devices = [str(device) for device in devices_of(named)]
    if len(devices) == 1:
        return partial(label_part, arguments.out, load_model(path), part, device=devices[0])
    from spear_fast.labelling.devices import label_on_devices

    return partial(label_on_devices, arguments.out, path, devices, part, threads=arguments.threads)


def _label_on_ray(arguments: argparse.Namespace) -> Callable[..., Any]:
    from spear_fast.ray import label_on_ray

    there = {"actors": arguments.ray_actors, "gpus": arguments.ray_gpus, "cpus": arguments.threads or 1}
    return partial(label_on_ray, address=arguments.ray or None, **there)


def sources_on_many(arguments: argparse.Namespace, devices: Sequence[Any]) -> Callable[..., Any]:
    """Returns what does as `spear_fast.labelling.label`, on a Ray cluster or with a process for each device."""
    path = str(Path(arguments.model).resolve())
    if arguments.ray is not None:
        return planned_and_finished(partial(_label_on_ray(arguments), model=path), path)
    from spear_fast.labelling.devices import label_on_devices

    names = [str(device) for device in devices]
    return planned_and_finished(partial(label_on_devices, model=path, devices=names, threads=arguments.threads), path)


def planned_and_finished(label_planned: Callable[..., Any], path: str) -> Callable[..., Any]:
    """Returns what plans, labels what is planned, and finishes, with the arguments of `spear_fast.labelling.label`."""
    from spear_fast.labelling import finish, plan

    def run(sources: Any, model: Any, out: str, options: Any, *, about: dict[str, Any], lock: bool, **rest: Any) -> Any:
        plan(sources, model, out, options, model_path=path, lock=lock)
        summary = label_planned(out, lock=lock, **rest)
        finish(out, lock=lock, about=about)
        return summary

    return run


def _device_name(planned: str) -> str:
    """Returns the device of this process where none is named: of the plan's kind, and its own of several GPUs."""
    import torch

    kind = planned.partition(":")[0]
    local = os.environ.get("LOCAL_RANK", "")
    if kind != "cuda" or not local.isdecimal() or not torch.cuda.is_available():
        return kind
    # a launcher may show each process a single GPU
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def planned_device(arguments: argparse.Namespace) -> Any:
    """Returns the device that is planned for; the machine that plans need not have the workers' own."""
    import torch

    name = arguments.device.partition(",")[0]
    device = device_of("auto") if name in ("auto", "all") else torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {arguments.device} cannot be planned for: it must be cpu or cuda.")
    return device


def run_plan(arguments: argparse.Namespace) -> int:
    """Plans; see `spear_fast.labelling.plan`."""
    from spear_fast.checkpoints.load import load_model
    from spear_fast.labelling.errors import readable
    from spear_fast.labelling.parts import plan

    device = planned_device(arguments)
    path = str(Path(arguments.model).resolve())
    planned = plan(
        arguments.sources,
        load_model(arguments.model),
        arguments.out,
        options_of(arguments, device),
        model_path=path,
        lock=not arguments.no_lock,
    )
    if not arguments.quiet:
        count = len(planned.shards)
        print(
            readable(f"{len(planned.rows)} utterances planned in {count} shards for {device.type} in {arguments.out}")
        )
    return EXIT_DONE


def run_finish(arguments: argparse.Namespace) -> int:
    """Finishes; see `spear_fast.labelling.finish`."""
    from spear_fast.labelling.errors import readable
    from spear_fast.labelling.parts import finish

    totals = finish(arguments.out, lock=not arguments.no_lock)
    if not arguments.quiet:
        failed = f", {totals.failed} failed (see {Path(arguments.out) / 'failed.jsonl'})" if totals.failed else ""
        print(readable(f"{totals.rows} utterances labelled in {arguments.out}{failed}"))
    return EXIT_SOME_FAILED if totals.failed else EXIT_DONE
