"""Readers of files: each good form once, each clear error once."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.data.tables import column, read_table
from fedtune.errors import DataError

WANTED = ["text", "label"]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path) -> list[tuple[str, str]]:
    table = read_table(path, WANTED)
    return list(zip(column(table, "text", "data.text"), column(table, "label", "data.label")))


def test_every_format_gives_the_same_columns(tmp_path):
    rows = [("good, really", "1"), ('she said "no"', "0"), ("zwei\nZeilen ü", "1")]
    written(
        tmp_path / "a.csv",
        'label,other,text\n1,x,"good, really"\n0,x,"she said ""no"""\n1,x,"zwei\nZeilen ü"\n',
    )
    written(tmp_path / "a.tsv", 'label\ttext\n1\tgood, really\n0\t"she said ""no"""\n1\t"zwei\nZeilen ü"\n')
    first = '{"text":"good, really","label":1}\n\n'
    written(
        tmp_path / "a.jsonl",
        first + '{"label":0,"text":"she said \\"no\\""}\n{"text":"zwei\\nZeilen ü","label":"1"}',
    )
    pq.write_table(
        pa.table({"label": [1, 0, 1], "text": [text for text, _ in rows], "vector": [[1.0]] * 3}),
        tmp_path / "a.parquet",
    )
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        assert texts(tmp_path / name) == rows, name


def test_byte_order_mark_and_windows_lines_are_taken(tmp_path):
    assert texts(written(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\r\na,1\r\n\r\nb,0\r\n")) == [
        ("a", "1"),
        ("b", "0"),
    ]
    assert texts(written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text":"a","label":true}\r\n')) == [
        ("a", "true")
    ]


def test_a_long_field_is_taken(tmp_path):
    long = "word " * 100_000
    assert texts(written(tmp_path / "a.csv", f"text,label\n{long},1\n")) == [(long, "1")]


def test_line_separators_inside_json_strings_are_text(tmp_path):
    assert texts(written(tmp_path / "a.jsonl", '{"text":"a\u2028b\x85c","label":1}\n')) == [
        ("a\u2028b\x85c", "1")
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty; the first line must name the columns"),
        ("a.csv", "text,label\n", "has no rows; give a file with at least one"),
        ("a.jsonl", "\n", "has no rows"),
        (
            "a.txt",
            "x",
            "suffix '.txt' is not known; known: .csv, .tsv, .jsonl, .parquet, or a folder of images",
        ),
        (
            "a.csv",
            "text,label\na,1\nb,c,0\n",
            "row 2 (line 3) has 3 fields, the header has 2; quote fields that hold the delimiter",
        ),
        ("a.csv", 'text,label\n"two\nlines",1\nb\n', "row 2 (line 4) has 1 field, the header has 2"),
        (
            "a.csv",
            'text,label\na,1\n"never closed,0\nc,1\n',
            "line 4: broken quoting (unexpected end of data)",
        ),
        (
            "a.tsv",
            'text\tlabel\n"hello" he said\t1\n',
            "line 2: broken quoting ('\\t' expected after '\"'); write a quote",
        ),
        ("a.csv", "text,label,text\na,1,b\n", "column 'text' stands 2 times; rename all but one"),
        (
            "a.csv",
            b"text,label\nok,1\ncaf\xe9,0\n",
            "line 3 is not UTF-8 (byte 19 is 0xe9); save the file as UTF-8",
        ),
        ("a.csv", "text,label\n".encode("utf-16"), "line 1 is not UTF-8 (byte 0 is 0xff)"),
        ("a.jsonl", b'{"text":"\xff"}\n', "line 1 is not UTF-8 (byte 9 is 0xff)"),
        (
            "a.jsonl",
            '{"text":"a"}\n\n{"text":"b"\n',
            "line 3 is not valid JSON (Expecting ',' delimiter at character 12); write one object a line",
        ),
        ("a.jsonl", "[1]\n", "line 1 is not an object but list; write lines such as"),
        ("a.jsonl", "[" * 200_000, "line 1 is not valid JSON (nested too deeply)"),
        ("a.parquet", b"PAR1 nothing PAR1", "is not a readable parquet file"),
        ("a.parquet", b"", "is not a readable parquet file"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, name, content, message):
    path = written(tmp_path / name, content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_table(path, WANTED)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none.csv: does not exist; check data.source"):
        read_table(tmp_path / "none.csv", WANTED)


def test_a_folder_named_like_a_file(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "a.csv", WANTED)


def test_a_cut_parquet_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100, "label": [1] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(DataError, match="is not a readable parquet file"):
        read_table(written(tmp_path / "a.parquet", whole[: len(whole) // 2]), WANTED)


def test_damaged_parquet_pages(tmp_path):
    pq.write_table(
        pa.table({"text": [f"text {n}" for n in range(1000)], "label": [1] * 1000}), tmp_path / "a.parquet"
    )
    whole = bytearray((tmp_path / "a.parquet").read_bytes())
    whole[4:200] = b"\xff" * 196
    with pytest.raises(DataError, match="is not a readable parquet file"):
        read_table(written(tmp_path / "a.parquet", bytes(whole)), WANTED)


def test_parquet_text_in_another_encoding(tmp_path):
    latin = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": latin, "label": [1, 0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 2, column 'text' is not UTF-8; write the file again as UTF-8"):
        read_table(tmp_path / "a.parquet", WANTED)


def test_a_missing_column_lists_those_there_are(tmp_path):
    table = read_table(written(tmp_path / "a.csv", "texts,label\na,1\n"), WANTED)
    with pytest.raises(
        DataError, match=r"no column 'text' \(data.text\); did you mean 'texts'\? columns: 'texts', 'label'$"
    ):
        column(table, "text", "data.text")


def test_a_column_of_lists(tmp_path):
    table = read_table(
        written(tmp_path / "a.jsonl", '{"text":"a","label":1}\n{"text":["b"],"label":1}\n'), WANTED
    )
    with pytest.raises(
        DataError,
        match="row 2, column 'text': holds a list, not text or a number; flatten the column or name another",
    ):
        column(table, "text", "data.text")


def test_missing_values_are_empty(tmp_path):
    assert texts(written(tmp_path / "a.jsonl", '{"text":"a","label":1}\n{"text":null}\n')) == [
        ("a", "1"),
        ("", ""),
    ]


def test_what_is_not_a_number_is_missing(tmp_path):
    pq.write_table(
        pa.table({"text": ["a", "b", "c"], "label": [1.5, float("nan"), None]}), tmp_path / "a.parquet"
    )
    assert texts(tmp_path / "a.parquet") == [("a", "1.5"), ("b", ""), ("c", "")]
    assert texts(written(tmp_path / "a.jsonl", '{"text":"a","label":NaN}\n{"text":"b","label":"nan"}\n')) == [
        ("a", ""),
        ("b", "nan"),
    ]
