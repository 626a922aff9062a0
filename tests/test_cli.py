"""`spear-fast label` as a user meets it: exit statuses, what goes to which stream, one sentence for each mistake."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from labelling_jobs import (
    random_rows,
    read_failed,
    read_rows,
    shard_bytes,
    tiny_model,
    write_audio,
    write_lines,
)

from spear_fast import cli
from spear_fast.labelling.files import FolderLock

SHORT = ["--max-length", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with both tokenizers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(text=True, speech=True).save_pretrained(folder)
    return folder


@pytest.fixture
def tokens(tmp_path):
    return write_lines(tmp_path / "tokens.jsonl", random_rows(20))


def run(*arguments, status):
    """Runs a command in this process and checks its exit status."""
    assert cli.main([str(argument) for argument in arguments]) == status


def error_of(capsys):
    """Returns the one sentence on standard error; nothing stands on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("spear-fast: error: ")
    return lines[0]


def test_a_job_ends_with_a_summary_on_standard_output(tmp_path, tokens, folder, capsys):
    run("label", tokens, "--model", folder, "--out", tmp_path / "out", *SHORT, status=0)
    captured = capsys.readouterr()
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"u{index}" for index in range(20)]
    assert all(isinstance(row["text"], str) for row in rows)
    assert captured.out.startswith("20 utterances labelled in ")
    for word in ("audio ", "tokens/s", "labelling", "x real time", "mean confidence", "unfinished"):
        assert word in captured.out
    assert "20/20 utterances" in captured.err
    assert "Traceback" not in captured.err


def test_failed_rows_give_status_3(tmp_path, folder, capsys):
    rows = random_rows(5)
    rows[2]["tokens"] = [1000]
    tokens = write_lines(tmp_path / "t.jsonl", rows)
    for _ in range(2):
        run("label", tokens, "--model", folder, "--out", tmp_path / "out", *SHORT, status=3)
        assert "1 (see " in capsys.readouterr().out
    assert [row["id"] for row in read_failed(tmp_path / "out")] == ["u2"]


def test_quiet_says_nothing(tmp_path, tokens, folder, capsys):
    run("label", tokens, "--model", folder, "--out", tmp_path / "out", "--quiet", *SHORT, status=0)
    assert capsys.readouterr() == ("", "")


def test_json_says_everything_in_lines(tmp_path, tokens, folder, capsys):
    command = ["label", tokens, "--model", folder, "--out", tmp_path / "out", "--json"]
    run(*command, *SHORT, status=0)
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "summary"]
    assert {event["event"] for event in events} == {"start", "prepared", "batch", "shard", "summary"}
    assert events[-1]["rows"] == 20
    assert captured.err == ""

    run(*command, "--max-length", 7, status=2)
    captured = capsys.readouterr()
    (event,) = [json.loads(line) for line in captured.out.splitlines()]
    assert event["event"] == "error"
    assert "options.max_length was 6 and is 7" in event["message"]
    assert captured.err == f"spear-fast: error: {event['message']}\n"


def test_audio_folders_manifests_and_parquet_are_sources_too(tmp_path, folder, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_audio(tmp_path / "speech" / "a" / "x.flac")
    write_audio(tmp_path / "speech" / "y.wav", 0.5, 44100, channels=2)
    (tmp_path / "m.csv").write_text("id,audio\nfrom-list,speech/y.wav\n")
    pq.write_table(pa.table({"id": ["t"], "tokens": [[1, 2, 3]]}), tmp_path / "t.parquet")
    sources = [tmp_path / "speech", tmp_path / "m.csv", tmp_path / "t.parquet"]
    run("label", *sources, "--model", folder, "--out", tmp_path / "out", *SHORT, status=0)
    rows = {row["id"]: row for row in read_rows(tmp_path / "out")}
    assert list(rows) == ["a/x", "y", "from-list", "t"]
    assert rows["y"]["source"] == rows["from-list"]["source"]
    assert {field: rows["y"][field] for field in ("target", "score")} == {
        field: rows["from-list"][field] for field in ("target", "score")
    }


def test_num_shards_decides_the_number_of_files(tmp_path, tokens, folder):
    run("label", tokens, "--model", folder, "--out", tmp_path / "out", "--num-shards", 3, "--quiet", *SHORT, status=0)
    assert sorted(shard_bytes(tmp_path / "out")) == [f"labels-{index:05d}-of-00003.parquet" for index in range(3)]


def test_a_checkpoint_of_the_reference_is_a_model(tmp_path, tokens):
    model = tiny_model()
    torch.save({"model": model.state_dict(), "optim": {}, "steps": 3}, tmp_path / "semantic.pt")
    run("label", tokens, "--model", tmp_path / "semantic.pt", "--out", tmp_path / "a", "--quiet", *SHORT, status=0)
    model.save_pretrained(tmp_path / "model")
    run("label", tokens, "--model", tmp_path / "model", "--out", tmp_path / "b", "--quiet", *SHORT, status=0)
    assert read_rows(tmp_path / "a") == read_rows(tmp_path / "b")


def test_search_options_reach_the_search(tmp_path, tokens, folder):
    command = ["label", tokens, "--model", folder, "--quiet", *SHORT]
    run(*command, "--out", tmp_path / "plain", status=0)
    changes = (["--beam-size", 1], ["--length-penalty", 0], ["--early-stopping", "never"])
    for number, change in enumerate(changes):
        run(*command, "--out", tmp_path / str(number), *change, status=0)
    scores = [[row["score"] for row in read_rows(tmp_path / name)] for name in ("plain", "0", "1", "2")]
    assert scores[0] != scores[1]
    assert scores[0] != scores[2]
    # looking longer never finds less
    assert all(late >= soon - 1e-6 for soon, late in zip(scores[0], scores[3], strict=True))


def test_penalties_reach_the_search_and_the_manifest(tmp_path, tokens, folder, capsys):
    command = ["label", tokens, "--model", folder, "--quiet", *SHORT]
    run(*command, "--out", tmp_path / "plain", status=0)
    flags = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "coverage_penalty": 0.5}
    plain = [(row["target"], row["score"]) for row in read_rows(tmp_path / "plain")]
    for name, value in flags.items():
        flag = [f"--{name.replace('_', '-')}", value]
        run(*command, "--out", tmp_path / name, *flag, status=0)
        rows = read_rows(tmp_path / name)
        assert [(row["target"], row["score"]) for row in rows] != plain
        options = json.loads((tmp_path / name / "manifest.json").read_text())["identity"]["options"]
        assert options[name] == value
        run(*command, "--out", tmp_path / "plain", *flag, status=2)
        assert f"options.{name} was" in error_of(capsys)
    rows = read_rows(tmp_path / "no_repeat_ngram_size")
    assert all(len(set(row["target"])) == len(row["target"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["lable"], "invalid choice: 'lable'"),
        (["label"], "the following arguments are required: SOURCE, --model, --out"),
        (["label", "x", "--model", "m", "--out", "o", "--beam-size", "0"], "at least 1, got '0'"),
        (
            ["label", "x", "--model", "m", "--out", "o", "--beam-size", "four"],
            "a whole number of at least 1, got 'four'",
        ),
        (["label", "x", "--model", "m", "--out", "o", "--batch-tokens", "1.5"], "at least 1, got '1.5'"),
        (["label", "x", "--model", "m", "--out", "o", "--length-penalty", "nan"], "must be a number, got 'nan'"),
        (["label", "x", "--model", "m", "--out", "o", "--early-stopping", "yes"], "invalid choice: 'yes'"),
        (["label", "x", "--model", "m", "--out", "o", "--coverage-penalty", "-1"], "must be 0 or more, got -1.0"),
        (["label", "x", "--model", "m", "--out", "o", "--repetition-penalty", "0"], "must be above 0, got 0.0"),
        (["label", "x", "--model", "m", "--out", "o", "--no-repeat-ngram-size", "-2"], "of 0 or more, got -2"),
        (["label", "x", "--model", "m", "--out", "o", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["label", "x", "--model", "m", "--out", "o", "--beam", "3"], "unrecognized arguments: --beam 3"),
        (
            ["label", "x", "--model", "m", "--out", "o", "--num-shards", "2", "--rows-per-shard", "2"],
            "not allowed with",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message, capsys):
    run(*arguments, status=2)
    assert message in error_of(capsys)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta:x"])
def test_a_device_that_is_not_there_is_an_error(tmp_path, tokens, folder, device, capsys):
    run("label", tokens, "--model", folder, "--out", tmp_path / "out", "--device", device, status=2)
    assert f"--device {device} cannot be used here" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_missing_or_has_duplicates_is_an_error(tmp_path, folder, capsys):
    run("label", tmp_path / "no.wav", "--model", folder, "--out", tmp_path / "out", status=2)
    assert "no.wav does not exist" in error_of(capsys)
    tokens = write_lines(tmp_path / "t.jsonl", [*random_rows(3), *random_rows(1)])
    run("label", tokens, "--model", folder, "--out", tmp_path / "out", status=2)
    assert "'u0' (row 1 of t.jsonl and row 4 of t.jsonl)" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_an_error(tmp_path, tokens, folder, capsys):
    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out"):
        run("label", tokens, "--model", folder, "--out", tmp_path / "out", status=2)
    assert "is in use by process" in error_of(capsys)


def test_what_nobody_foresaw_is_one_sentence_too(tmp_path, tokens, folder, capsys, monkeypatch):
    import spear_fast.labelling

    def fails(*_args, **_kwargs):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(spear_fast.labelling, "label", fails)
    command = ["label", tokens, "--model", folder, "--out", tmp_path / "out"]
    run(*command, status=2)
    assert "unexpected ZeroDivisionError: division by zero; run again with --debug" in error_of(capsys)
    with pytest.raises(ZeroDivisionError):
        cli.main([*map(str, command), "--debug"])


def test_a_missing_package_is_named_with_its_remedy(tmp_path, tokens, folder, capsys, monkeypatch):
    import spear_fast.labelling

    def fails(*_args, **_kwargs):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(spear_fast.labelling, "label", fails)
    run("label", tokens, "--model", folder, "--out", tmp_path / "out", status=2)
    assert "needs the package pyarrow; install it with: pip install 'spear-fast[label]'" in error_of(capsys)


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted_it_keeps_what_is_done_and_says_how_to_go_on(tmp_path, folder, number, status):
    import signal

    tokens = write_lines(tmp_path / "tokens.jsonl", random_rows(400))
    options = ["--max-length", "12", "--rows-per-shard", "64", "--batch-tokens", "512", "--threads", "1"]
    command = ["label", str(tokens), "--model", str(folder), "--out", str(tmp_path / "out"), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "spear_fast", *command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if json.loads(line)["event"] == "shard":
            process.send_signal(getattr(signal, number))
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert json.loads(rest.splitlines()[-1])["event"] == "interrupted"
    message = errors.splitlines()[-1]
    assert "of 400 utterances are done" in message
    assert message.endswith(f"resume with: {shlex.join(['spear-fast', *command, '--json'])}")
    assert "Traceback" not in errors
    committed = shard_bytes(tmp_path / "out")
    assert 1 <= len(committed) < 7

    run(*command, "--quiet", status=0)
    assert committed.items() <= shard_bytes(tmp_path / "out").items()
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [f"u{index}" for index in range(400)]


def test_help_does_not_wait_for_torch():
    code = "import sys; from spear_fast import cli; cli.main(['label', '--help']); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0
    for word in ("exit status: 0 all done, 3 some rows failed", "--batch-tokens", "--early-stopping"):
        assert word in run.stdout


def test_a_reader_that_leaves_early_is_no_error_of_ours():
    command = [sys.executable, "-m", "spear_fast", "info", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait()
    assert "Traceback" not in errors
