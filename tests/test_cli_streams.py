"""Streams that are closed, full or left; file systems without locks; a second Ctrl-C; sizes that cannot be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from labelling_jobs import random_rows, read_rows, tiny_model, write_lines

from spear_fast import cli
from spear_fast.cli_streams import QuietStream
from spear_fast.labelling.stopping import StopSignal

SHORT = ["--max-length", "6", "--rows-per-shard", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(text=True, speech=True).save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, folder):
    tokens = write_lines(tmp_path / "tokens.jsonl", random_rows(20))
    return ["label", str(tokens), "--model", str(folder), "--out", str(tmp_path / "out"), *SHORT]


def shell(command, redirections):
    line = f"{shlex.join([sys.executable, '-m', 'spear_fast', *command])} {redirections}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_job_that_nobody_listens_to_is_done_all_the_same(tmp_path, command, redirections, as_json):
    run = shell([*command, *(["--json"] if as_json else [])], redirections)
    assert run.returncode == 0
    assert "Traceback" not in run.stderr
    assert "Exception" not in run.stderr
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [f"u{index}" for index in range(20)]
    if redirections.startswith("2>"):
        assert run.stdout


def test_a_result_that_cannot_be_written_is_an_error():
    run = shell(["info", "--json"], "> /dev/full")
    assert run.returncode == 2
    assert run.stderr == "spear-fast: error: cannot write to standard output: No space left on device.\n"
    assert shell(["info"], ">&-").returncode == 0


def test_text_that_the_encoding_lacks_is_escaped():
    import io

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    QuietStream(stream).write("é\udce9")
    assert raw.getvalue() == b"\\xe9\\udce9"


def test_interrupts_in_the_closing_words_end_cleanly(command, capsys, monkeypatch):
    import spear_fast.labelling

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(spear_fast.labelling, "label", interrupted)
    assert cli.main(command) == 130
    assert "stopped at once; resume with: spear-fast label" in capsys.readouterr().err
    monkeypatch.setattr(cli, "say_stopped", interrupted)
    assert cli.main(command) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_that_a_library_makes_an_error_of_is_one(command, capsys, monkeypatch):
    import spear_fast.labelling

    def fails(*_, stop, **__):
        stop._take(signal.SIGINT, None)
        try:
            stop._take(signal.SIGINT, None)
        except KeyboardInterrupt as error:
            raise RuntimeError("the operation was cancelled") from error

    monkeypatch.setattr(spear_fast.labelling, "label", fails)
    assert cli.main(command) == 130
    assert "stopped at once" in capsys.readouterr().err


def test_a_signal_is_taken_with_standard_error_closed(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "__stderr__", stream)
    stop = StopSignal()
    stop._take(signal.SIGTERM, None)
    assert stop.is_set()
    assert stop.signal == signal.SIGTERM


def test_a_file_system_without_locks_is_named_and_there_is_a_way_round(tmp_path, command, capsys, monkeypatch):
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):

        def flock(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        assert cli.main(command) == 2
        message = capsys.readouterr().err
        assert f"the file system of {tmp_path / 'out'} has no locks ({os.strerror(number)})" in message
        assert "add --no-lock" in message
    assert cli.main([*command, "--no-lock", "--quiet"]) == 0
    assert len(read_rows(tmp_path / "out")) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "meta"], "--device meta cannot be used here: it must be cpu or cuda"),
        (["--threads", "100000"], "must be at most 1024, got '100000'"),
        (["--workers", "100000"], "must be at most 1024, got '100000'"),
        (["--no-repeat-ngram-size", "2147483648"], "no_repeat_ngram_size must be"),
        (["--batch-tokens", "2147483648"], "at most 2147483647"),
        (["--max-source-tokens", "2147483647"], "bytes"),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence(command, arguments, message, capsys):
    assert cli.main([*command, *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "utterances" not in line or "error" in line]
    assert line.startswith("spear-fast: error: ")
    assert message in line
    assert "unexpected" not in line


def test_a_deep_manifest_of_labels_is_one_sentence(tmp_path, command, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("[" * 200_000)
    assert cli.main(command) == 2
    assert "manifest.json is not readable: it is nested too deeply; give another --out" in capsys.readouterr().err


def test_events_of_a_whole_job_are_json(command, capsys):
    assert cli.main([*command, "--json"]) == 0
    assert all("event" in json.loads(line) for line in capsys.readouterr().out.splitlines())
