"""Whether training in bfloat16 learns what training in float32 learns: the same batches, the same draws, the loss.

    python -m benchmarks convergence --work build/espeak --steps 500

Trains the recipe's model of `examples/espeak` from speech tokens to text with the package's trainer, on the data that
the recipe has prepared: in float32, in bfloat16 as the trainers do by default on a GPU, and in bfloat16 with the
residual stream in float32. The weights are float32 in each. A loss that ends further than 1 % from float32's misses the
aim.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows as rowfile
from benchmarks.machine import REPOSITORY, environment
from benchmarks.options import add_where, resolved
from spear_fast import SemanticToTextTrainer, TextToSemantic
from spear_fast.training.accelerated import use_half_residual

FLOAT32, BFLOAT16, WIDE_RESIDUAL = "float32", "bfloat16", "bfloat16, residual float32"
VARIANTS = (FLOAT32, BFLOAT16, WIDE_RESIDUAL)
# steps whose losses are averaged; percent that a loss may end from float32's
LAST, WITHIN = 50, 1.0
LEARNING_RATE, WARMUP, BATCH_TOKENS, SEED = 1.2e-3, 100, 2400, 0
HEADER = ("convergence", "in", "loss of training, nats a token", "of validation", "from float32", "aim")

Pairs = list[tuple[Tensor, Tensor]]


def recipe(work: Path) -> tuple[TextToSemantic, Pairs]:
    """Returns the recipe's new model and its training data, speech and text ids.

    Raises FileNotFoundError where the recipe has not prepared them.
    """
    if not (work / "data.jsonl").is_file():
        raise FileNotFoundError(f"{work}/data.jsonl is not there; python examples/espeak/recipe.py makes it first.")
    sys.path.insert(0, str(REPOSITORY / "examples/espeak"))
    data, text, train = (importlib.import_module(name) for name in ("data", "text", "train"))
    examples = data.load(work).training
    tokenizer = text.train_tokenizer(example.utterance.text for example in examples)
    speech = importlib.import_module("spear_fast.speech").MelKMeansTokenizer.load(work / "tokenizer")
    pairs = [
        (torch.from_numpy(example.tokens), torch.tensor(tokenizer.encode(example.utterance.text).ids))
        for example in examples
    ]
    return train.new_model(tokenizer.get_vocab_size(), speech, SEED), pairs


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """Returns what `trained` does, of a fresh process: accelerate takes one precision for the whole of a process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(trained, *arguments, torch.get_num_threads()).result()


def trained(work: Path, variant: str, steps: int, device: torch.device, threads: int) -> dict[str, Any]:
    """Trains for `steps`; returns the losses of all steps, of validation at the end, and the seconds it took."""
    torch.set_num_threads(threads)
    model, pairs = recipe(work)
    torch.manual_seed(SEED)
    precision = "no" if variant == FLOAT32 else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        trainer = SemanticToTextTrainer(
            model, dataset=pairs, num_train_steps=steps, num_warmup_steps=WARMUP, batch_size=32,
            max_batch_tokens=BATCH_TOKENS, lr=LEARNING_RATE, max_grad_norm=1.0, log_every=steps,
            save_results_every=2 * steps, save_model_every=2 * steps, results_folder=f"{folder}/results",
            accelerate_kwargs={"mixed_precision": precision, "cpu": device.type == "cpu"},
        )  # fmt: skip
        if variant == WIDE_RESIDUAL:
            use_half_residual(model, "no")
        losses: list[Tensor] = []
        began = time.perf_counter()
        trainer.train(lambda logs: losses.append(logs["loss"]))
        seconds = time.perf_counter() - began
        return {"losses": torch.stack(losses).tolist(), "valid": trainer.validate(), "seconds": seconds}


def measure(work: Path, steps: int, variants: Sequence[str], device: torch.device, out: Path | None) -> bool:
    """Trains by each variant, prints and writes its row; returns whether all ended near float32."""
    near, whole = True, None
    for variant in variants:
        found = in_own_process(work, variant, steps, device)
        last = {"train": sum(found["losses"][-LAST:]) / len(found["losses"][-LAST:]), "valid": found["valid"]}
        row: dict[str, Any] = {
            "benchmark": "convergence",
            "case": f"espeak, {steps} steps",
            "variant": variant,
            "loss": {name: round(value, 5) for name, value in last.items()},
            "curve": [round(value, 4) for value in found["losses"][:: max(1, steps // 50)]],
            "seconds": round(found["seconds"], 1),
            **environment(device),
        }
        if variant == FLOAT32:
            whole = last
        elif whole is not None:
            row["percent_from"] = {name: round(100 * (last[name] / whole[name] - 1), 2) for name in last}
            row |= {"wanted": {"percent": WITHIN}}
            row["reached"] = all(abs(value) <= WITHIN for value in row["percent_from"].values())
            near &= row["reached"]
        row = rowfile.finished(row)
        rowfile.append(out, [row])
        print(rowfile.table(HEADER, [line(row)]) + "\n", flush=True)
    return near


def line(row: rowfile.Row) -> tuple[str, ...]:
    """Returns a row of the table."""
    apart = row.get("percent_from", {})
    aim = f"within {row['wanted']['percent']:g} %: {'reached' if row['reached'] else '**missed**'}" if apart else ""
    return (
        row["case"],
        row["variant"],
        f"{row['loss']['train']:.4f}",
        f"{row['loss']['valid']:.4f}",
        ", ".join(f"{value:+.2f} %" for value in apart.values()),
        aim,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence", description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build/espeak", help="the recipe's working folder")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add_where(parser)
    chosen = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    where = resolved(chosen)
    return 0 if measure(chosen.work, chosen.steps, chosen.variants, where.device, where.out) else 1
