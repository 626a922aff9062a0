"""What a trainer has from accelerate: one process among several, on some device, at some precision."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spear_fast.model import TextToSemantic
from spear_fast.training.trainer_arguments import check_accelerate_arguments


def make_accelerator(split_batches: bool, accelerate_kwargs: dict[str, Any], model: nn.Module) -> Any:
    """Returns an `accelerate.Accelerator`; raises ValueError for arguments that it would take and the loop not obey.

    Where nothing is said of precision, a GPU that multiplies bfloat16 does so with a float32 model.
    """
    check_accelerate_arguments(accelerate_kwargs)
    try:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise ImportError(
            f"training needs the package accelerate: pip install 'spear_fast[train]' ({error})."
        ) from error
    arguments = dict(accelerate_kwargs)
    if multiplies_bfloat16(arguments, model):
        arguments["mixed_precision"] = "bf16"
    arguments["dataloader_config"] = DataLoaderConfiguration(split_batches=split_batches)
    return Accelerator(**arguments)


def multiplies_bfloat16(arguments: Mapping[str, Any], model: nn.Module) -> bool:
    """Returns whether a model trains in bfloat16 though nobody has asked for any precision.

    arguments: of `accelerate.Accelerator`; they, what `accelerate launch` says, and the precision that an accelerator
        has chosen for this process before, come first.
    """
    from accelerate.state import is_initialized

    if "mixed_precision" in arguments or "ACCELERATE_MIXED_PRECISION" in os.environ or arguments.get("cpu"):
        return False
    if is_initialized():
        return False
    whole = all(each.dtype == torch.float32 for each in model.parameters() if each.requires_grad)
    return whole and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def use_half_residual(model: TextToSemantic, mixed_precision: str) -> None:
    """Keeps the residual stream in bfloat16 where matmuls are; float16 would overflow."""
    for transformer in (model.source_transformer, model.target_transformer):
        transformer.half_residual = mixed_precision == "bf16"


def leave_out_of_reduction(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Keeps parameters that a task has no use for out of what DistributedDataParallel waits for.

    It would otherwise have to walk the graph of each step to find them.
    prefixes: begin the names of those parameters within the module's `model`.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    unused = [name for name in names if name.removeprefix("model.").startswith(tuple(prefixes))]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, unused)


class Accelerated(nn.Module):
    """A module with an `accelerator` and a `model`, and the reference's names for what they know."""

    accelerator: Any
    model: TextToSemantic
    # from what to what `generate` goes
    source_type: str
    target_type: str

    def print(self, msg: str) -> None:
        """Prints a line, on the main process alone."""
        self.accelerator.print(msg)

    def end_trackers(self) -> None:
        """Tells the trackers of `log_with` that the run is over; later logs go nowhere."""
        # not accelerator.end_training, which also takes the process group away: another stage may follow
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model generates, in the direction that is trained; see `TextToSemantic.generate`."""
        directed = {"source_type": self.source_type, "target_type": self.target_type, **kwargs}
        return self.accelerator.unwrap_model(self.model).generate(*args, **directed)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def is_distributed(self) -> bool:
        """Whether several processes train together."""
        return self.accelerator.num_processes > 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the first of all."""
        return self.accelerator.is_main_process

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first on its machine."""
        return self.accelerator.is_local_main_process
