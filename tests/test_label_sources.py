"""What can be labelled: files, folders, manifests, token files; ids and what is wrong with them."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelling_jobs import write_lines

from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.sources import open_source, open_sources


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def items(*paths):
    listing = open_sources(paths)
    return list(listing.items(0, len(listing)))


def test_a_folder_lists_audio_at_any_depth_in_a_fixed_order(tmp_path):
    for name in ("b/2.FLAC", "a.wav", "b/10.ogg", "c d/é.mp3", ".hidden/x.wav", "b/._2.wav", "b/notes.txt"):
        touch(tmp_path / "speech" / name)
    found = items(tmp_path / "speech")
    assert [item.id for item in found] == ["a", "b/10", "b/2", "c d/é"]
    assert [item.audio for item in found] == [
        tmp_path / "speech" / name for name in ("a.wav", "b/10.ogg", "b/2.FLAC", "c d/é.mp3")
    ]


def test_links_to_folders_are_followed_and_a_circle_ends(tmp_path):
    touch(tmp_path / "store" / "x.wav")
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "speech")
    assert [item.id for item in items(tmp_path / "speech")] == ["linked/x"]


def test_a_name_that_is_no_utf8_becomes_an_id_that_is(tmp_path):
    touch(tmp_path / "good.wav")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "wb"):
        pass
    assert [item.id for item in items(tmp_path)] == ["caf\\xe9", "good"]


def test_files_and_folders_come_in_the_order_given(tmp_path):
    touch(tmp_path / "z.wav")
    touch(tmp_path / "dir" / "a.wav")
    assert [item.id for item in items(tmp_path / "z.wav", tmp_path / "dir")] == ["z", "a"]


def test_a_manifest_is_relative_to_its_own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "lists"
    folder.mkdir()
    rows = [{"id": "one", "audio": "../x.wav"}, {"id": 2, "audio": "/abs/y.flac", "speaker": "s"}]
    from_lines = items(write_lines(folder / "list.jsonl", rows))
    (folder / "list.csv").write_text("\ufeffid,speaker,audio\none,s,../x.wav\n2,s,/abs/y.flac\n", encoding="utf-8")
    assert [(item.id, str(item.audio)) for item in from_lines] == [("one", f"{folder}/../x.wav"), ("2", "/abs/y.flac")]
    assert [(item.id, item.audio) for item in items(folder / "list.csv")] == [
        (item.id, item.audio) for item in from_lines
    ]


def test_broken_manifest_rows_are_rows_with_a_problem(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"id": "a", "audio": "a.wav"}\nnot json\n\n{"audio": "b.wav"}\n{"id": "c"}\n["d"]\n')
    found = items(path)
    assert [(item.id, item.problem) for item in found] == [
        ("a", None),
        ("list.jsonl:2", "the line is not JSON."),
        ("list.jsonl:3", "the row has no id."),
        ("c", "the row has no path under 'audio'."),
        ("list.jsonl:5", "the line is not a JSON object."),
    ]


ROWS = [{"id": f"r{index}", "tokens": list(range(index % 5, 7))} for index in range(3000)]


def token_parquet(path, row_group_size=700, kind=None, rows=ROWS):
    tokens = pa.array([row["tokens"] for row in rows], kind or pa.list_(pa.int16()))
    table = pa.table({"id": [row["id"] for row in rows], "tokens": tokens, "other": pa.nulls(len(rows))})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.int16()), pa.large_list(pa.uint8()), pa.list_(pa.int64())])
def test_token_files_are_read_in_any_order_of_windows(tmp_path, kind):
    parquet = open_source(token_parquet(tmp_path / "t.parquet", kind=kind))
    lines = open_source(write_lines(tmp_path / "t.jsonl", ROWS))
    assert list(parquet.ids()) == list(lines.ids()) == [row["id"] for row in ROWS]
    for start, stop in ((0, 3), (3, 1500), (2990, 3000), (699, 701), (701, 702), (0, 1)):
        for source in (parquet, lines):
            found = list(source.items(start, stop))
            assert [item.id for item in found] == [row["id"] for row in ROWS[start:stop]]
            assert all(item.tokens.dtype == np.int64 for item in found)
            assert [item.tokens.tolist() for item in found] == [row["tokens"] for row in ROWS[start:stop]]


def test_a_listing_reads_across_its_sources(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [{"id": f"a{index}", "tokens": [index]} for index in range(5)])
    second = token_parquet(tmp_path / "b.parquet", rows=[{"id": f"b{index}", "tokens": [index]} for index in range(4)])
    listing = open_sources([first, second])
    assert [item.id for item in listing.items(3, 7)] == ["a3", "a4", "b0", "b1"]
    assert [item.id for item in listing.items(0, 9)] == [*(f"a{index}" for index in range(5)), "b0", "b1", "b2", "b3"]


def test_broken_token_rows_are_rows_with_a_problem(tmp_path):
    lines = ['{"id": "a", "tokens": [1, 2.5]}', '{"id": "b"}', '{"tokens": [1]}', '{"id": "c", "tokens": [true]}']
    lines += [
        '{"id": "d", "tokens": "12"}',
        '{"id": "e", "tokens": [99999999999999999999]}',
        '{"id": "f", "tokens": []}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(['{"id": "ok", "tokens": [1]}', *lines]))
    found = items(tmp_path / "t.jsonl")
    wrong = "'tokens' must be a list of whole numbers."
    problems = [None, wrong, wrong, "the row has no id.", wrong, wrong, wrong, None]
    assert [item.problem for item in found] == problems
    assert [item.id for item in found] == ["ok", "a", "b", "t.jsonl:4", "c", "d", "e", "f"]

    table = pa.table({"id": ["a", None, "c", ""], "tokens": [[1], [2], None, [3]]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = items(tmp_path / "t.parquet")
    assert [item.id for item in found] == ["a", "t.parquet:2", "c", "t.parquet:4"]
    assert [item.problem is None for item in found] == [True, False, False, False]


def test_duplicate_ids_are_named_with_their_places(tmp_path):
    rows = [{"id": f"x{index % 7}", "tokens": [1]} for index in range(14)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    with pytest.raises(LabellingError, match="got the same one twice") as caught:
        open_sources([path])
    assert "'x0' (row 1 of t.jsonl and row 8 of t.jsonl)" in str(caught.value)
    assert "and 2 more" in str(caught.value)


def test_the_same_name_with_two_suffixes_is_a_duplicate(tmp_path):
    touch(tmp_path / "a.wav")
    touch(tmp_path / "a.flac")
    with pytest.raises(LabellingError, match=r"'a' \(row 1 of .* and row 2 of"):
        open_sources([tmp_path])


def test_a_million_ids_are_listed_lightly(tmp_path):
    count = 1_000_000
    ids = pa.array(np.char.add("utterance-", np.arange(count).astype(str)))
    tokens = pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), pa.array(np.zeros(count, np.int16)))
    pq.write_table(pa.table({"id": ids, "tokens": tokens}), tmp_path / "t.parquet")
    listing = open_sources([tmp_path / "t.parquet"])
    assert len(listing) == count
    assert [item.id for item in listing.items(777_777, 777_779)] == ["utterance-777777", "utterance-777778"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.wav", None, "does not exist"),
        ("notes.txt", b"hello", "is of a kind that is not known"),
        ("empty.jsonl", b"", "got nothing"),
        ("other.jsonl", b'{"text": "hello"}\n', "got text"),
        ("list.csv", b"name,path\na,b\n", "must have the columns id and audio, got name, path"),
        ("latin.csv", b"id,audio\ncaf\xe9,x.wav\n", "is not CSV in UTF-8"),
        ("t.parquet", b"PAR1 and then nothing", "is not a readable Parquet file"),
    ],
)
def test_a_source_that_is_none_is_an_error_of_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabellingError, match=message) as caught:
        open_sources([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_audio_is_an_error(tmp_path):
    touch(tmp_path / "notes.txt")
    with pytest.raises(LabellingError, match="holds no audio"):
        open_sources([tmp_path])


def test_an_empty_token_file_leaves_nothing_to_label(tmp_path):
    token_parquet(tmp_path / "t.parquet", rows=[])
    with pytest.raises(LabellingError, match="nothing to label"):
        open_sources([tmp_path / "t.parquet"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "text": ["b"]}, "must have the columns id and tokens, got id, text"),
        ({"id": ["a"], "tokens": [[0.5]]}, "must be a list of integers, got list<"),
        ({"id": ["a"], "tokens": ["12"]}, "must be a list of integers, got string"),
    ],
)
def test_a_parquet_file_of_other_columns_is_an_error(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(LabellingError, match=message):
        open_sources([tmp_path / "t.parquet"])


def test_a_truncated_parquet_file_is_an_error(tmp_path):
    path = token_parquet(tmp_path / "t.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LabellingError, match="it may be truncated"):
        open_sources([path])


def test_a_parquet_file_damaged_inside_is_an_error(tmp_path):
    path = token_parquet(tmp_path / "t.parquet")
    content = bytearray(path.read_bytes())
    content[4:1500] = b"\xff" * 1496
    path.write_bytes(content)
    with pytest.raises(LabellingError, match="is damaged"):
        open_sources([path])


def test_identity_follows_the_ids_and_their_order(tmp_path):
    def identity(rows):
        return open_sources([write_lines(tmp_path / "t.jsonl", rows)]).identity()

    rows = [{"id": "a", "tokens": [1]}, {"id": "b", "tokens": [2]}]
    assert identity(rows) == identity(json.loads(json.dumps(rows)))
    assert identity(rows) != identity(rows[::-1])
    assert identity([{"id": "ab", "tokens": [1]}]) != identity(rows[:1])
