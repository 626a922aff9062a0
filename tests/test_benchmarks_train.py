"""Training's benchmark: beside the reference where it is installed, and never without a gate."""

from __future__ import annotations

from benchmarks import predict_training, rows, train
from spear_fast import cli
from spear_fast.ops import providers

OPTIONS = ["--set", "tiny", "--rounds", "1", "--device", "cpu"]


def test_training_is_measured_beside_the_reference(tmp_path):
    assert cli.main(["bench", "train", "--set", "tiny", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    found = {row["variant"]: row for row in rows.read(file)}
    assert set(found) == {"reference", "spear_fast", "spear_fast, checkpointed"}
    assert 0 < found["spear_fast"]["error_of_allowed"] <= 1


def test_without_the_reference_the_gate_is_plain_torch(tmp_path, monkeypatch, capsys):
    pair = train.pair
    monkeypatch.setattr(train, "pair", lambda case, **options: (None, pair(case, **options)[1]))
    assert cli.main(["bench", "train", *OPTIONS, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    row, again = rows.read(file)
    assert [row["variant"], again["variant"]] == ["spear_fast", "spear_fast, checkpointed"]
    assert 0 < row["error_of_allowed"] <= 1
    # a provider that is off is seen
    right = providers.get("rms_norm", "reference").function

    def wrong(*arguments):
        out, *others = right(*arguments)
        return (out * 1.01, *others)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(providers, "_providers", {**providers._providers, "rms_norm": [
            providers.Provider("rms_norm", "wrong", wrong), *providers._providers["rms_norm"]]})  # fmt: skip
        providers.chosen("rms_norm").clear()
        assert cli.main(["bench", "train", *OPTIONS]) == 1
    providers.chosen("rms_norm").clear()
    assert "times what is allowed; nothing was timed" in capsys.readouterr().out


def test_a_step_in_bfloat16_launches_few_kernels():
    """A ceiling that only ever goes down: a cast for each parameter made it 985 at six layers on each side."""
    cases = {case.name: case for case in train.CASES}
    assert predict_training.counted(cases["512x6 b32"]) <= 613
    assert predict_training.counted(cases["1024x12 b32"]) <= 1111
