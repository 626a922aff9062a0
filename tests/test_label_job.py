"""A labelling job from token files: the model's own labels, resumed without loss, the same however made."""

from __future__ import annotations

import json
import shutil
import threading

import duckdb
import numpy as np
import pytest
import torch
from labelling_jobs import (
    NUM_SPEECH_IDS,
    NUM_TEXT_IDS,
    random_rows,
    read_failed,
    read_rows,
    shard_bytes,
    tiny_model,
    write_lines,
)

from spear_fast import TextToSemantic
from spear_fast.decoding import DecodingOptions
from spear_fast.decoding.packed import linear
from spear_fast.labelling import Interrupted, LabellingError, LabelOptions, label
from spear_fast.labelling.labeller import is_repetitive
from spear_fast.labelling.options import LabelOptions as Options
from spear_fast.ops import extension

# four utterances side by side
OPTIONS = LabelOptions(max_length=12, rows_per_shard=10, batch_tokens=1024)


class Recorder:
    """Keeps all events."""

    def __init__(self):
        self.events = []

    def __call__(self, event, **fields):
        self.events.append((event, fields))

    def close(self):
        pass

    def of(self, name):
        return [fields for event, fields in self.events if event == name]


@pytest.fixture
def tokens(tmp_path):
    return write_lines(tmp_path / "tokens.jsonl", random_rows(47))


def test_labels_are_those_of_the_model_one_by_one(tmp_path, tokens):
    model = tiny_model(text=True)
    summary = label([tokens], model, tmp_path / "out", OPTIONS)
    rows = read_rows(tmp_path / "out")
    given = random_rows(47)
    assert [row["id"] for row in rows] == [row["id"] for row in given]
    assert [row["source"] for row in rows] == [row["tokens"] for row in given]
    lengths = set()
    for row in rows:
        result = model.generate(
            torch.tensor([row["source"]]),
            source_type="speech",
            target_type="text",
            beam_search_decode=True,
            beam_mode="standard",
            beam_size=4,
            max_length=12,
            return_result=True,
        )
        length, finished = int(result.lengths[0, 0]), bool(result.finished[0, 0])
        expected = [token for token in result.tokens[0, 0, :length].tolist() if token != 0]
        assert row["target"] == expected
        assert row["text"] == "".join(chr(ord("a") + token - 1) for token in expected)
        assert (row["finished"], row["num_target"], row["num_source"]) == (finished, len(expected), len(row["source"]))
        assert row["score"] == pytest.approx(float(result.scores[0, 0]), abs=1e-5)
        assert row["mean_logprob"] == pytest.approx(float(result.sum_logprobs[0, 0]) / (length + finished), abs=1e-5)
        assert ("truncated" in row["flags"]) == (not finished)
        assert NUM_TEXT_IDS not in row["target"]
        lengths.add((length, finished))
    # labels of several lengths, some of which end
    assert len(lengths) > 3
    assert {finished for _, finished in lengths} == {True, False}
    assert summary.rows == 47
    assert summary.unfinished_share == pytest.approx(np.mean([not row["finished"] for row in rows]))
    assert summary.mean_confidence == pytest.approx(np.mean(np.exp([row["mean_logprob"] for row in rows])), abs=1e-5)


def test_a_model_without_text_tokenizer_leaves_text_null(tmp_path, tokens):
    label([tokens], tiny_model(), tmp_path / "out", OPTIONS)
    assert {row["text"] for row in read_rows(tmp_path / "out")} == {None}


def test_duckdb_and_datasets_read_the_folder_as_it_is(tmp_path, tokens, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    out = tmp_path / "out"
    label([tokens], tiny_model(text=True), out, OPTIONS)
    rows = read_rows(out)
    found = duckdb.sql(f"SELECT id, source, text, flags FROM '{out}/data/labels-*.parquet' ORDER BY ALL").fetchall()
    assert found == sorted((row["id"], row["source"], row["text"], row["flags"]) for row in rows)
    cache = str(tmp_path / "cache")
    by_card = datasets.load_dataset(str(out), split="train", cache_dir=cache)
    by_files = datasets.load_dataset(
        "parquet", data_files=f"{out}/data/labels-*.parquet", split="train", cache_dir=cache
    )
    assert list(by_card) == list(by_files) == rows


def test_a_shard_where_every_row_failed_is_readable_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    rows = [{"id": f"bad{index}", "tokens": []} for index in range(10)] + random_rows(10)
    out = tmp_path / "out"
    summary = label([write_lines(tmp_path / "t.jsonl", rows)], tiny_model(), out, OPTIONS)
    assert (summary.rows, summary.failed, summary.shards) == (10, 10, 2)
    assert duckdb.sql(f"SELECT count(*) FROM '{out}/data/labels-*.parquet'").fetchall() == [(10,)]
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"][:] == [f"u{index}" for index in range(10)]


def test_bad_rows_are_recorded_once_and_the_job_goes_on(tmp_path):
    rows = random_rows(25)
    bad = {
        3: ([], "the source is empty"),
        7: ([1, -1, 2], "must be from 0 to 29, got -1 at position 1"),
        12: ([5] * 3 + [NUM_SPEECH_IDS], "must be from 0 to 29, got 30 at position 3"),
        21: ([1] * 101, "the source is 101 tokens long, the limit is 100"),
        24: ([1.5], "must be a list of whole numbers"),
    }
    for index, (ids, _) in bad.items():
        rows[index]["tokens"] = ids
    path = write_lines(tmp_path / "t.jsonl", rows)
    options = Options(max_length=6, rows_per_shard=4, max_source_tokens=100)
    for _ in range(3):
        summary = label([path], tiny_model(), tmp_path / "out", options)
        assert (summary.rows, summary.failed) == (20, 5)
        failed = read_failed(tmp_path / "out")
        assert [row["id"] for row in failed] == [f"u{index}" for index in bad]
        for row, (_, reason) in zip(failed, bad.values(), strict=True):
            assert reason in row["reason"]
            assert row["source"] == str(path)
        assert [row["id"] for row in read_rows(tmp_path / "out")] == [f"u{i}" for i in range(25) if i not in bad]


def test_stopped_anywhere_and_run_again_the_files_are_the_same(tmp_path, tokens):
    model = tiny_model()
    label([tokens], model, tmp_path / "whole", OPTIONS)
    wanted = shard_bytes(tmp_path / "whole")
    assert len(wanted) == 5
    out = tmp_path / "pieces"
    runs = restored = 0
    while True:
        stop = threading.Event()
        seen = Recorder()

        def after_one_batch(event, stop=stop, seen=seen, **fields):
            seen(event, **fields)
            if event == "batch" and not fields["restored"]:
                stop.set()

        after_one_batch.close = lambda: None
        runs += 1
        try:
            label([tokens], model, out, OPTIONS, report=after_one_batch, stop=stop)
        except Interrupted:
            restored += sum(fields["restored"] for fields in seen.of("batch"))
            continue
        break
    assert runs > 8
    # nothing is decoded twice: what a stopped run had finished is taken from its journal
    assert restored > 0
    assert shard_bytes(out) == wanted
    assert not list(out.glob(".*.journal"))
    assert not list(out.glob(".*.tmp"))
    assert read_rows(out) == read_rows(tmp_path / "whole")


def test_a_journal_is_taken_up_to_where_it_is_whole(tmp_path, tokens):
    label([tokens], tiny_model(), tmp_path / "whole", OPTIONS)
    wanted, out = shard_bytes(tmp_path / "whole"), tmp_path / "out"
    stop = threading.Event()

    def stopping(event, **fields):
        # in the middle of the second shard
        if event == "shard":
            stop.set()

    stopping.close = lambda: None
    with pytest.raises(Interrupted, match="labels of unfinished shards are kept"):
        label([tokens], tiny_model(), out, OPTIONS, report=stopping, stop=stop)
    (journal, *_) = sorted(path for path in out.glob(".*.journal") if path.stat().st_size)
    lines = journal.read_bytes().splitlines(keepends=True)
    for content, kept in (
        (lines, len(lines)),
        ([*lines[:-1], lines[-1][:-1]], len(lines) - 1),
        ([*lines[:-1], lines[-1][:30]], len(lines) - 1),
        ([b'{"labels": [1]}\n', *lines], 0),
        ([b"[]\n", *lines], 0),
        ([b"\x00\xff\n"], 0),
    ):
        copy = tmp_path / f"copy{len(list(tmp_path.glob('copy*')))}"
        shutil.copytree(out, copy)
        (copy / journal.name).write_bytes(b"".join(content))
        seen = Recorder()
        label([tokens], tiny_model(), copy, OPTIONS, report=seen)
        known = sum(len(json.loads(line)["labels"]) for line in lines[:kept])
        later = sum(len(json.loads(line)["labels"]) for path in sorted(out.glob(".*.journal")) if path != journal
                    for line in path.read_bytes().splitlines())  # fmt: skip
        assert sum(fields["rows"] for fields in seen.of("batch") if fields["restored"]) == known + later
        assert shard_bytes(copy) == wanted


def test_a_finished_job_run_again_decodes_nothing(tmp_path, tokens, monkeypatch):
    label([tokens], tiny_model(), tmp_path / "out", OPTIONS)
    before = shard_bytes(tmp_path / "out")
    seen = Recorder()
    monkeypatch.setattr(TextToSemantic, "engine", None)
    summary = label([tokens], tiny_model(), tmp_path / "out", OPTIONS, report=seen)
    assert not seen.of("batch")
    assert (summary.rows, summary.rows_this_run) == (47, 0)
    assert shard_bytes(tmp_path / "out") == before


def test_a_damaged_shard_is_labelled_again(tmp_path, tokens):
    out = tmp_path / "out"
    label([tokens], tiny_model(), out, OPTIONS)
    before = shard_bytes(out)
    path = sorted((out / "data").glob("*.parquet"))[2]
    path.write_bytes(path.read_bytes()[:100])
    seen = Recorder()
    label([tokens], tiny_model(), out, OPTIONS, report=seen)
    assert [fields["name"] for fields in seen.of("shard")] == [path.name]
    assert path.name in seen.of("warning")[0]["message"]
    assert shard_bytes(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(options=Options(max_length=13, rows_per_shard=10, batch_tokens=1024)),
            r"options\.max_length was 12 and is 13",
        ),
        (dict(model=dict(seed=2)), r"model\.weights was [0-9a-f]{12}… and is [0-9a-f]{12}…"),
        (dict(model=dict(text=True)), r"text_tokenizer was absent and is "),
        (dict(model=dict(text_pad_id=3)), r"model\.config\.text_pad_id was 0 and is 3"),
        (dict(rows=46), r"sources\.1\.ids was [0-9a-f]{12}… and is [0-9a-f]{12}…; sources\.1\.rows was 47 and is 46"),
    ],
)
def test_another_job_on_the_same_folder_is_told_what_differs(tmp_path, tokens, change, message):
    label([tokens], tiny_model(), tmp_path / "out", OPTIONS)
    before = shard_bytes(tmp_path / "out")
    write_lines(tokens, random_rows(change.get("rows", 47)))
    with pytest.raises(LabellingError, match=message):
        label([tokens], tiny_model(**change.get("model", {})), tmp_path / "out", change.get("options", OPTIONS))
    assert shard_bytes(tmp_path / "out") == before


def test_failed_rows_can_be_tried_again(tmp_path):
    rows = random_rows(20)
    tokens, out = tmp_path / "t.jsonl", tmp_path / "out"
    write_lines(tokens, [*rows[:15], {**rows[15], "tokens": []}, *rows[16:]])
    label([tokens], tiny_model(), out, OPTIONS)
    write_lines(tokens, rows)
    assert label([tokens], tiny_model(), out, OPTIONS).failed == 1
    seen = Recorder()
    summary = label([tokens], tiny_model(), out, OPTIONS, report=seen, retry_failed=True)
    assert (summary.rows, summary.failed) == (20, 0)
    assert len(seen.of("shard")) == 1
    assert read_failed(out) == []
    assert [row["id"] for row in read_rows(out)] == [row["id"] for row in rows]


def test_events_add_up(tmp_path, tokens):
    seen = Recorder()
    summary = label([tokens], tiny_model(), tmp_path / "out", OPTIONS, report=seen)
    assert seen.events[0][0] == "start"
    assert seen.events[-1][0] == "summary"
    assert seen.of("start")[0]["rows"] == 47
    rows = read_rows(tmp_path / "out")
    assert sum(fields["rows"] for fields in seen.of("batch")) == 47
    assert sum(fields["source_tokens"] for fields in seen.of("batch")) == sum(row["num_source"] for row in rows)
    generated = sum(fields["tokens"] for fields in seen.of("batch"))
    # pads inside a label are stripped after they were generated
    assert generated >= sum(row["num_target"] + row["finished"] for row in rows)
    seconds = sum(fields["seconds"] for fields in seen.of("batch"))
    assert summary.tokens_per_second == pytest.approx(generated / seconds)
    assert json.dumps(seen.events)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["totals"]["rows"] == sum(shard["rows"] for shard in manifest["shards"]) == 47
    assert "torch" in manifest["runs"][0]["versions"]


def test_weights_that_give_no_finite_score_stop_the_job(tmp_path, tokens):
    model = tiny_model()
    with torch.no_grad():
        model.target_transformer.final_norm.gamma.fill_(float("inf"))
    with pytest.raises(LabellingError, match="are not finite"):
        label([tokens], model, tmp_path / "out", OPTIONS)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_half_precision_is_the_jobs_alone(tmp_path, tokens, monkeypatch):
    model = tiny_model(speech=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    centres = model.wav2vec.centres.clone()
    used = []
    make = TextToSemantic.engine

    def engine(self, **options):
        used.append((self.token_emb["text"].weight.dtype, self.wav2vec.centres.dtype, self.training))
        return make(self, **options)

    monkeypatch.setattr(TextToSemantic, "engine", engine)
    options = Options(max_length=4, dtype="bfloat16", num_shards=1)
    for _ in range(2):
        # the second time the fingerprint is that of the weights that were given
        assert label([tokens], model, tmp_path / "out", options).rows == 47
    label([tokens], model, tmp_path / "exact", Options(max_length=4))
    assert used == [(torch.bfloat16, torch.float32, False), (torch.float32, torch.float32, False)]
    assert torch.equal(model.wav2vec.centres, centres)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def without_memory_for_more_than(monkeypatch, count):
    from spear_fast.decoding import runner

    step = runner.step

    def failing(decoder, view, mix):
        if view.batch > count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(decoder, view, mix)

    monkeypatch.setattr(runner, "step", failing)


def test_an_utterance_that_does_not_fit_says_what_to_lower(tmp_path, tokens, monkeypatch):
    without_memory_for_more_than(monkeypatch, 0)
    with pytest.raises(LabellingError, match="lower --max-source-tokens, --max-length or --beam-size"):
        label([tokens], tiny_model(), tmp_path / "out", OPTIONS)


def test_out_of_memory_the_job_goes_on_with_fewer_and_says_so(tmp_path, tokens, monkeypatch):
    label([tokens], tiny_model(), tmp_path / "whole", OPTIONS)
    without_memory_for_more_than(monkeypatch, 2)
    seen = Recorder()
    assert label([tokens], tiny_model(), tmp_path / "out", OPTIONS, report=seen).rows == 47
    assert ["continuing with 2 utterances" in fields["message"] for fields in seen.of("warning")] == [True]
    same = [(row["id"], row["target"]) for row in read_rows(tmp_path / "whole")]
    assert [(row["id"], row["target"]) for row in read_rows(tmp_path / "out")] == same


def test_an_error_while_decoding_stops_the_job_and_what_was_done_is_kept(tmp_path, tokens, monkeypatch):
    from spear_fast.decoding import runner

    label([tokens], tiny_model(), tmp_path / "whole", OPTIONS)
    step, calls = runner.step, []

    def failing(decoder, view, mix):
        calls.append(1)
        if len(calls) == 40:
            raise RuntimeError("the device is gone")
        return step(decoder, view, mix)

    monkeypatch.setattr(runner, "step", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        label([tokens], tiny_model(), tmp_path / "out", OPTIONS)
    seen = Recorder()
    label([tokens], tiny_model(), tmp_path / "out", OPTIONS, report=seen)
    assert any(fields["restored"] for fields in seen.of("batch")) or len(seen.of("shard")) < 5
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_labels_are_the_same_to_the_bit_whatever_else_is_labelled(tmp_path, monkeypatch):
    """Another order, other shards, other neighbours: the same labels and scores."""
    # torch's own matmuls, which round by the number of their rows where those are few
    monkeypatch.setattr(linear, "packs", lambda weight: False)
    model = tiny_model(dim=128)
    sizes = dict(max_length=12, batch_tokens=1024, beam_size=1)
    rows = random_rows(40)
    others = [{**row, "id": f"other{row['id']}"} for row in random_rows(25, seed=5)]
    label([write_lines(tmp_path / "a.jsonl", rows)], model, tmp_path / "a", LabelOptions(rows_per_shard=10, **sizes))
    mixed = [*others[:12], *reversed(rows), *others[12:]]
    options = LabelOptions(rows_per_shard=17, **sizes)
    label([write_lines(tmp_path / "b.jsonl", mixed)], model, tmp_path / "b", options)
    one, two = ({row["id"]: row for row in read_rows(tmp_path / name)} for name in "ab")
    assert len(one) == 40
    assert len(two) == 65
    assert one == {key: two[key] for key in one}
    # slots stay free at the end of a job; these are nothing but an end
    for begin in range(0, 40, 4):
        out = tmp_path / f"few{begin}"
        label([write_lines(tmp_path / "few.jsonl", rows[begin : begin + 4])], model, out, options)
        assert read_rows(out) == [one[row["id"]] for row in rows[begin : begin + 4]]


def test_a_model_is_packed_once_a_job_and_slots_are_filled_across_shards(tmp_path, tokens, monkeypatch):
    from spear_fast.decoding import Decoder, Encoder, runner

    packed, widths = [], []
    for side in (Decoder, Encoder):
        make = side.from_modules
        monkeypatch.setattr(side, "from_modules", lambda *a, make=make, **k: packed.append(1) or make(*a, **k))
    admit = runner.Runner.admit
    monkeypatch.setattr(
        runner.Runner, "admit", lambda self, *a: admit(self, *a) or widths.append((self.used, self.slots))
    )
    label([tokens], tiny_model(), tmp_path / "out", OPTIONS)
    assert len(packed) == 2
    # but for the very last ones a slot is taken as soon as it is free, at the edges of the five shards too
    assert all(used == count == 4 for used, count in widths)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([], False),
        ([5] * 11, False),
        ([5] * 12, True),
        ([1, 2, 3] + [5] * 12 + [7], True),
        ([1, 2, 3] * 3, False),
        ([1, 2, 3] * 4, True),
        ([9, 9, *([1, 2, 3, 4, 5] * 4), 8], True),
        ([9, 9, *([1, 2, 3, 4, 5] * 3), 1, 2, 3, 4, 8], False),
        (list(range(16)) * 4, True),
        (list(range(17)) * 4, False),
        (list(range(200)), False),
    ],
)
def test_loops_are_repetitive(target, expected):
    assert is_repetitive(np.array(target, dtype=np.int64)) is expected


def test_one_source_needs_no_list_and_a_path_is_no_model(tmp_path, tokens):
    assert label(str(tokens), tiny_model(), str(tmp_path / "out"), OPTIONS).rows == 47
    with pytest.raises(LabellingError, match="model must be a TextToSemantic, got str"):
        label([tokens], "model", tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    "wrong",
    [dict(beam_size=0), dict(max_length=2.5), dict(num_shards=True), dict(early_stopping="no"), dict(dtype="int4")],
)
def test_options_of_the_wrong_kind_are_refused(wrong):
    with pytest.raises(LabellingError, match=next(iter(wrong))):
        LabelOptions(**wrong)


def test_options_hold_those_of_decoding_and_keep_their_names_in_a_jobs_identity():
    plain = LabelOptions(beam_size=2, max_length=9, device="cuda:1")
    assert plain == LabelOptions(DecodingOptions(beam_size=2, max_length=9), device="cuda:1")
    # folders of before are resumed: nothing here may be called otherwise
    assert plain.identity() == dict(
        *[dict(beam_size=2, length_penalty=1.0, early_stopping=False, repetition_penalty=1.0, no_repeat_ngram_size=0)],
        **dict(coverage_penalty=0.0, max_length=9, max_source_tokens=4096, batch_tokens=8192, num_shards=None),
        **dict(rows_per_shard=512, device="cuda", dtype="float32"),
    )
    assert LabelOptions(patience=2.0).identity()["patience"] == 2.0
    for wrong in (
        dict(method="greedy"),
        dict(beam_mode="reference"),
        dict(num_return_sequences=2),
        dict(cond_scale=3.0),
    ):
        with pytest.raises(LabellingError, match=f"{next(iter(wrong))} must be"):
            LabelOptions(DecodingOptions(**wrong))
    with pytest.raises(TypeError, match="beams"):
        LabelOptions(beams=4)


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_weights_of_8_bits_label_nearly_the_same(tmp_path, tokens):
    rows = {}
    for dtype in ("float32", "int8"):
        out = tmp_path / dtype
        label([tokens], tiny_model(), out, LabelOptions(max_length=12, batch_tokens=1024, dtype=dtype))
        rows[dtype] = read_rows(out)
    pairs = list(zip(rows["float32"], rows["int8"], strict=True))
    # random weights: what is nearly as likely may be swapped
    same = [(exact, rounded) for exact, rounded in pairs if exact["target"] == rounded["target"]]
    assert len(same) > 0.5 * len(pairs)
    assert any(exact["mean_logprob"] != rounded["mean_logprob"] for exact, rounded in same)
    for exact, rounded in same:
        assert rounded["mean_logprob"] == pytest.approx(exact["mean_logprob"], abs=0.1)
    with pytest.raises(LabellingError, match="dtype"):
        label([tokens], tiny_model(), tmp_path / "int8", LabelOptions(max_length=12, batch_tokens=1024))
