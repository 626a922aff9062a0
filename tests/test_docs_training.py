"""The page about training: its code runs as it stands, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import spear_fast

PAGE = Path(__file__).parents[1] / "docs/training.md"


def test_the_page_about_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert names["tokens"].shape[0] == 2
    assert int(names["again"].steps) == 25
    checkpoints = {path.parent.name for path in tmp_path.glob("*/*.pt")}
    assert checkpoints == {"pretrained", "back-translation", "text-to-speech"}
    loaded = spear_fast.load_model("my-model")
    for name, value in names["model"].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
