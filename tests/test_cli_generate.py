"""`spear-fast generate`: the results of `TextToSemantic.generate`, from every source, in every format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from labelling_jobs import NUM_SPEECH_IDS, random_rows, tiny_model, write_lines

from spear_fast import cli, cli_outputs, load_model
from spear_fast.cli_inputs import as_ids
from spear_fast.speech import read_audio

ESPEAK = Path(__file__).resolve().parent.parent / "examples" / "espeak"
MOST = ["--max-length", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a small random model with a text tokenizer of the letters a to s."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(text=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def run(*arguments, status=0):
    assert cli.main(["generate", *map(str, arguments)]) == status


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def expected(model, tokens, **options):
    """Returns what `generate` makes of speech tokens: the ids of each hypothesis."""
    settings = dict(beam_search_decode=True, beam_mode="standard", beam_size=4, num_return_sequences=1, max_length=6)
    result = model.generate(
        torch.tensor([tokens]), source_type="speech", target_type="text", return_result=True, **settings | options
    )
    return [ids[:length].tolist() for ids, length in zip(result.tokens[0], result.lengths[0], strict=True)]


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("spear-fast: error: ")
    return line


def test_tokens_become_text(model, folder, capsys):
    sources = [row["tokens"] for row in random_rows(5)]
    run(*(" ".join(map(str, tokens)) for tokens in sources), "--model", folder, *MOST)
    wanted = [model.tokenizer.decode(expected(model, tokens)[0]) for tokens in sources]
    assert capsys.readouterr().out.splitlines() == wanted
    assert len(set(wanted)) > 1


def test_results_are_written_while_they_are_decoded(folder, capsys, monkeypatch):
    """The same lines with `--stream` and without, and of what is decoded greedily a piece after every step."""
    sources = [" ".join(map(str, row["tokens"])) for row in random_rows(5)]
    for options in (["--greedy"], ["--beam", "3"], ["--sample", "--seed", "4"]):
        for way in ([], ["--from", "text", "--to", "tokens"]):
            inputs = ["abc", "d", "cab"] if way else sources
            command = [*inputs, "--model", folder, *MOST, *options, *way]
            run(*command)
            wanted = capsys.readouterr().out
            pieces = []
            with monkeypatch.context() as patch:
                patch.setattr(sys.stdout, "write", lambda text, pieces=pieces: pieces.append(text))
                run(*command, "--stream", "--batch-size", "2")
            assert "".join(pieces) == wanted
            if options == ["--greedy"] and way:
                # a blank before every id but the first, which stands beside the one before
                assert sum(piece not in ("", "\n") for piece in pieces) > len(inputs)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--unordered"], "--unordered"), (["--n-best", "2"], "--n-best"), (["--format", "jsonl"], "jsonl")],
)
def test_what_cannot_be_streamed_is_refused(folder, capsys, options, says):
    run("1 2", "--model", folder, "--stream", *options, status=2)
    assert says in error_of(capsys)


def test_lines_grow_by_whole_letters_and_begin_anew_where_they_must():
    written: list[str] = []
    lines = cli_outputs.StreamedLines(written.append)
    for tokens, text in (([1], "\ufffd"), ([1, 2], "ä"), ([1, 2, 3], "ä "), ([1, 2, 3, 4], "ä b")):
        lines.grow(tokens, text)
    lines("", [cli_outputs.Hypothesis([1, 2, 3, 4], "ä b", 0.0, 0.0, True)])
    assert written == ["ä", " b", "\n"]
    lines.grow([5], "x")
    lines("", [cli_outputs.Hypothesis([5, 6], "yz", 0.0, 0.0, True)])
    assert written[3:] == ["x", "\nyz\n"]
    lines.grow([7], None)
    lines("", [])
    assert written[5:] == ["7", "\n"]


def test_text_becomes_tokens(model, folder, capsys):
    run("a", "b", "--model", folder, *MOST)
    wanted = [
        model.generate([text], source_type="text", target_type="speech", beam_search_decode=True,
                       beam_mode="standard", beam_size=4, num_return_sequences=1, max_length=6, return_result=True)
        for text in ("a", "b")
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [as_ids(line) for line in lines] == [
        result.tokens[0, 0, : result.lengths[0, 0]].tolist() for result in wanted
    ]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "npy", "parquet"])
def test_every_kind_of_file_gives_the_same(model, folder, tmp_path, capsys, kind):
    rows = random_rows(12)
    path = tmp_path / f"in.{kind}"
    if kind == "txt":
        path.write_text("".join(f"{row['tokens']}\n\n" for row in rows))
    elif kind == "jsonl":
        write_lines(path, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        array = np.full((len(rows), 40), -1)
        for line, row in zip(array, rows, strict=True):
            line[: len(row["tokens"])] = row["tokens"]
        np.save(path, array)
    run("--file", path, "--model", folder, "--format", "jsonl", *MOST)
    found = rows_of(capsys.readouterr().out)
    assert [row["tokens"] for row in found] == [expected(model, row["tokens"])[0] for row in rows]
    named = {"jsonl": [row["id"] for row in rows], "parquet": [row["id"] for row in rows]}
    numbers = [str(2 * i + 1 if kind == "txt" else i + 1) for i in range(len(rows))]
    assert [row["id"] for row in found] == named.get(kind, numbers)


def test_json_lines_say_everything(model, folder, capsys):
    run("1 2 3", "--model", folder, "--format", "jsonl", "--n-best", 3, "--beam", 5, *MOST)
    found = rows_of(capsys.readouterr().out)
    assert [(row["id"], row["rank"]) for row in found] == [("1", 1), ("1", 2), ("1", 3)]
    options = dict(beam_size=5, num_return_sequences=3)
    assert [row["tokens"] for row in found] == expected(model, [1, 2, 3], **options)
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    for row in found:
        assert row["text"] == model.tokenizer.decode(row["tokens"])
        # the length penalty is 1: the mean is what ranks
        assert row["mean_logprob"] == pytest.approx(row["score"], rel=1e-5)


def test_an_array_has_a_row_for_each_result(model, folder, tmp_path):
    sources = [row["tokens"] for row in random_rows(4)]
    write_lines(tmp_path / "in.jsonl", [*({"tokens": tokens} for tokens in sources), {"tokens": [10**6]}])
    run("--file", tmp_path / "in.jsonl", "--model", folder, "--out", tmp_path / "out.npy", *MOST, status=3)
    array = np.load(tmp_path / "out.npy")
    assert array.dtype == np.int64
    assert [row[row >= 0].tolist() for row in array] == [*(expected(model, each)[0] for each in sources), []]


def test_results_come_in_the_order_of_the_inputs_unless_told_not_to(folder, tmp_path):
    # the first one has most to say: others are done before it
    rows = random_rows(20)
    write_lines(tmp_path / "in.jsonl", rows)
    command = ["--file", tmp_path / "in.jsonl", "--model", folder, "--batch-size", 4, "--max-length", 30]
    run(*command, "--out", tmp_path / "ordered.jsonl")
    run(*command, "--out", tmp_path / "unordered.jsonl", "--unordered")
    ordered, unordered = (rows_of((tmp_path / f"{name}.jsonl").read_text()) for name in ("ordered", "unordered"))
    assert [row["id"] for row in ordered] == [row["id"] for row in rows]
    assert [row["id"] for row in unordered] != [row["id"] for row in ordered]
    assert sorted(unordered, key=lambda row: row["id"]) == sorted(ordered, key=lambda row: row["id"])


def test_greedy_and_draws(model, folder, capsys):
    run("4 5 6", "--model", folder, "--greedy", *MOST)
    likeliest = expected(model, [4, 5, 6], beam_search_decode=False, temperature=0.0, beam_mode="reference")
    assert capsys.readouterr().out.strip() == model.tokenizer.decode(likeliest[0])

    def drawn(*options):
        run("4 5 6", "7 8", "--model", folder, "--sample", "--format", "jsonl", "--n-best", 3, *MOST, *options)
        return [row["tokens"] for row in rows_of(capsys.readouterr().out)]

    assert drawn("--seed", 1) == drawn("--seed", 1)
    assert drawn("--seed", 1) != drawn("--seed", 2)
    assert drawn() != drawn()
    # one token to draw from is no draw
    assert drawn("--top-k", 1)[0] == likeliest[0]


def test_an_input_that_fails_changes_no_other(model, folder, tmp_path, capsys):
    rows = [{"id": "good", "tokens": [1, 2]}, {"id": "large", "tokens": [NUM_SPEECH_IDS]}, {"id": "none"},
            {"id": "words", "text": "a b"}, {"id": "long", "tokens": [1] * 50},
            {"id": "last", "tokens": [3]}]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{\n" + "[" * 100_000)
    run("--file", tmp_path / "in.jsonl", "--model", folder, "--max-source", 20, *MOST, status=3)
    captured = capsys.readouterr()
    good, *empty, last, _, _ = captured.out.splitlines()
    assert (good, last) == tuple(model.tokenizer.decode(expected(model, tokens)[0]) for tokens in ([1, 2], [3]))
    assert empty == [""] * 4
    reasons = ["large failed: ids must be from 0 to 29, got 30", "none failed: the row must have either",
               "words failed: the input is no list of ids", "long failed: source must have 1 to 20 ids",
               "7 failed: the line is not JSON", "8 failed: the line is not JSON"]  # fmt: skip
    lines = captured.err.splitlines()
    assert len(lines) == len(reasons)
    assert all(f"spear-fast: input {reason}" in captured.err for reason in reasons)


def test_letters_that_the_tokenizer_does_not_know_are_named(capsys):
    model = ESPEAK / "model"
    run("the BIG dog", "--model", model, *MOST)
    captured = capsys.readouterr()
    assert "input 1: the model's tokenizer leaves out B I G" in captured.err
    run("the  dog", "--model", model, *MOST)
    assert capsys.readouterr().out == captured.out
    run("ÄÖ", "--model", model, *MOST, status=2)
    assert "input 1 failed: the model's tokenizer knows nothing of the text" in capsys.readouterr().err


def test_what_a_tokenizer_pads_is_not_read_and_what_it_cuts_fails(folder, tmp_path, capsys):
    run("a", "--model", folder, "--format", "jsonl", *MOST)
    plain = capsys.readouterr().out

    def changed(source, **settings):
        changed = tmp_path / source.name
        shutil.copytree(source, changed)
        stored = json.loads((source / "tokenizer.json").read_text())
        (changed / "tokenizer.json").write_text(json.dumps({**stored, **settings}))
        return changed

    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    run("a", "--model", changed(folder, padding=padding), "--format", "jsonl", *MOST)
    assert capsys.readouterr().out == plain
    cutting = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    run("the dog sat", "--model", changed(ESPEAK / "model", truncation=cutting), *MOST, status=2)
    assert "input 1 failed: text 0 has more ids than the 3" in capsys.readouterr().err


def test_the_committed_model_hears_what_was_said(capsys):
    said = [json.loads(line) for line in (ESPEAK / "recordings" / "truth.jsonl").read_text().splitlines()][:3]
    model = load_model(ESPEAK / "model")
    sounds = [read_audio(ESPEAK / "recordings" / row["audio"], 16000).samples for row in said]
    sources = [" ".join(map(str, model.wav2vec.encode(sound).tolist())) for sound in sounds]
    run(*sources, "--model", ESPEAK / "model")
    assert capsys.readouterr().out.splitlines() == [row["text"] for row in said]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "the following arguments are required: --model"),
        (["a", "--greedy", "--sample"], "not allowed with argument"),
        (["a", "--beam", "0"], "at least 1, got '0'"),
        (["a", "--top-k", "3"], "--top-k is for draws; add --sample"),
        (["a", "--sample", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["a", "--greedy", "--n-best", "2"], "--n-best must be 1 with --greedy, got 2"),
        (["a", "--beam", "2", "--n-best", "3"], "--n-best must be at most --beam, 2, got 3"),
        (["a", "--out", "x.csv"], "--out must end in .txt, .jsonl or .npy, got x.csv"),
        (["a", "--format", "npy"], "--format npy needs a file"),
        (["a", "--out", "no/folder/x.txt"], "is in a folder that does not exist"),
        (["a", "--file", "b.txt"], "got both"),
        (["--file", "no.txt"], "--file no.txt does not exist"),
        (["--file", "empty.txt"], "there is no input"),
        (["--file", "empty.txt", "--out", "empty.txt"], "another file than --file"),
        (["--file", "a.dat"], "--file must end in .txt, .jsonl, .npy or .parquet, got a.dat"),
        (["--file", "a.dat", "--input-format", "npy"], "is not a readable .npy file"),
        (["--file", "a.dat", "--input-format", "parquet"], "is not a readable Parquet file"),
        (["--file", "other.parquet"], "must have a column text or tokens, got ['number']"),
        (["a", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message, tmp_path, monkeypatch, folder, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("a.dat").write_text("no array")
    pq.write_table(pa.table({"number": [1]}), "other.parquet")
    named = [] if "required" in message else ["--model", folder]
    run(*arguments, *named, status=2)
    assert message in error_of(capsys)


def test_text_needs_a_tokenizer(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "bare")
    run("abc", "--model", tmp_path / "bare", status=2)
    assert "no text tokenizer" in error_of(capsys)
    # ids are what is left to say
    run("1 2 3", "--model", tmp_path / "bare", *MOST)
    assert as_ids(capsys.readouterr().out)


def started(*arguments):
    command = [sys.executable, "-m", "spear_fast", "generate", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_line_is_answered_before_the_next_one_is_written(model, folder):
    process = started("--model", folder, *MOST)
    for tokens in ([1, 2, 3], [4, 5]):
        process.stdin.write(f"{tokens}\n")
        process.stdin.flush()
        assert process.stdout.readline() == model.tokenizer.decode(expected(model, tokens)[0]) + "\n"
    rest, errors = process.communicate(timeout=60)
    assert (rest, errors, process.returncode) == ("", "", 0)


def test_a_reader_that_leaves_is_met_with_silence(folder, tmp_path):
    write_lines(tmp_path / "in.jsonl", random_rows(300))
    process = started("--file", tmp_path / "in.jsonl", "--model", folder, *MOST)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


def test_a_reader_that_leaves_ends_a_source_without_end(folder):
    with subprocess.Popen(["yes", "1 2 3"], stdout=subprocess.PIPE) as endless:
        command = [sys.executable, "-m", "spear_fast", "generate", "--model", str(folder), *MOST]
        process = subprocess.Popen(command, stdin=endless.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        endless.stdout.close()
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 2
    process.stderr.close()


def test_a_full_disk_is_one_sentence(folder, capsys):
    run("1 2", "--model", folder, "--out", "/dev/full", "--format", "txt", status=2)
    assert error_of(capsys) == "spear-fast: error: No space left on device (/dev/full)."
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "spear_fast", "generate", "1 2", "--model", str(folder), *MOST]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "spear-fast: error: cannot write to standard output: No space left on device.\n"


def test_an_interrupt_is_one_sentence(folder):
    process = started("--model", folder, *MOST)
    process.stdin.write("1 2\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(2)
    _, errors = process.communicate(timeout=60)
    assert errors == "spear-fast: interrupted; the results that are written are whole\n"
    assert process.returncode == 130
