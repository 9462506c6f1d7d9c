"""Each format is read as its users write it; what is empty is left out and counted, and what is wrong is located."""

import csv
import io
import json
import math
import random

import pandas as pd
import pytest

from saelab.corpus import CorpusSettings, csv_files
from saelab.corpus.documents import Lane
from saelab.corpus.sources import open_source
from saelab.errors import SaelabError
from tests.corpus.made import EOT, TEXTS, check_resuming, documents, opened, tokenised, write


def read(path):
    """The contents of a source, in order; None for an empty document."""
    source = open_source(CorpusSettings(str(path)))
    return [document.content for document, _ in source.documents(random.Random(0), Lane(), None)]


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -- TSV and CSV

PROSE = [
    '"Hello, he said',
    "a line after it",
    '"Hello" and more',
    '"all of it in quotes"',
    'he said "hi"',
    'ends with a quote"',
    "form\x0cfeed, \u2028 and \x85",
]
FIELDS = ['he said "hi"', "two\nlines", "a tab\there", "par\n\npar", "plain", '"in quotes"\nand more', '"', '""\ttab']


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("head", ["text\tid", "text"])
def test_a_quote_in_a_tsv_is_an_ordinary_character(tmp_path, end, head):
    """Fields that begin with a quote, at the beginning, in the middle and at the end of the file, swallow nothing."""
    for rows in (PROSE, PROSE[1:] + PROSE[:1]):
        lines = [head, *("\t".join([text, "7"][: head.count("\t") + 1]) for text in rows)]
        assert read(put(tmp_path, "a.tsv", "\ufeff" + end.join(lines))) == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("text_first", [True, False])
def test_a_tsv_that_csv_or_pandas_wrote_is_recognised(tmp_path, quoting, text_first):
    frame = pd.DataFrame({"text": FIELDS, "id": "x"})[["text", "id"] if text_first else ["id", "text"]]
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=quoting)
    assert read(tmp_path / "a.tsv") == FIELDS


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_is_read_as_it_was_written_with_its_separator(tmp_path, separator):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator)
    writer.writerows([["id", "text"], *enumerate([*PROSE, *FIELDS, "a, b; c"])])
    assert read(put(tmp_path, "a.csv", "\ufeff" + file.getvalue())) == [*PROSE, *FIELDS, "a, b; c"]


def test_short_rows_blank_lines_and_equal_names_in_a_csv(tmp_path):
    path = put(tmp_path, "a.csv", 'text,text,id\none,other,1\n\ntwo\n,x,y\n  ,x\n"three" words,,\n')
    assert read(path) == ["one", "two", None, None, "three words"]
    assert read(put(tmp_path, "b.tsv", "id\ttext\n1\n2\tb\n")) == [None, "b"]


@pytest.mark.parametrize(
    "content, line, message",
    [
        ('id,text\n1,"never closed\n' + "2,more\n" * 50, 2, "opens a quote that is not closed properly up to the end"),
        ('id,text\n1,a\n2,"swallows\n3,"a line"\n4,b\n', 3, "opens a quote that is not closed properly up to line 4"),
        ('id,text\n1,"a" b,"c\n2,b\n', 2, "opens a quote"),
        ("id,text\n1,a\n2,b, c\n", 3, "has 3 fields and the first line has 2"),
        ("id,text\n1,a\rb\n", 2, "carriage return"),
        ('id,text\n1,"' + "long " * 400 + '"\n2,"' + "x" * 3000 + "\n" * 90 + '"\n', 3, "opens a quote"),
    ],
)
def test_faults_of_a_csv_are_located(tmp_path, monkeypatch, content, line, message):
    monkeypatch.setattr(csv_files, "LONGEST", 2500)
    with pytest.raises(SaelabError, match=rf"a\.csv, line {line} .*{message}"):
        read(put(tmp_path, "a.csv", content))


def test_a_tsv_with_a_field_too_many(tmp_path):
    with pytest.raises(SaelabError, match=r"a\.tsv, line 3 has 3 fields"):
        read(put(tmp_path, "a.tsv", "id\ttext\n1\ta\n2\tb\tc\n"))


# -- JSON

OBJECTS = [{"text": "one\u2028line"}, {"text": "two"}, {"id": 3}, {"text": None}, {"text": math.nan}, {"text": " \n"}]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", "\n\n" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in OBJECTS)),
        ("b.jsonl", "\ufeff" + json.dumps(OBJECTS, indent=1)),
        ("a.json", "\ufeff" + "\n".join(map(json.dumps, OBJECTS))),
        ("b.json", json.dumps(OBJECTS)),
        ("c.json", json.dumps({"data": OBJECTS}, indent=2)),
        ("d.json", json.dumps({"version": 1, "data": OBJECTS})),
        ("e.json", json.dumps({"rows": OBJECTS})),
        ("f.json", pd.DataFrame(OBJECTS).to_json(force_ascii=False)),
        ("g.json", json.dumps(pd.DataFrame(OBJECTS).to_dict("list"))),
    ],
)
def test_json_in_every_shape_with_keys_missing(tmp_path, name, content):
    assert read(put(tmp_path, name, content)) == ["one\u2028line", "two", None, None, None, None]


def test_a_folder_with_one_object_in_each_json_file(tmp_path):
    for n, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{n}.json").write_text(json.dumps({"text": text, "notes": [{"a": 1}]}, indent=2))
    assert sorted(read(tmp_path)) == sorted(TEXTS[:3])


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"},\n', "line 1 does not parse as JSON: ',' follows the object"),
        ('{"text": "a"}\n{"text": "b"}{"text": "c"}\n', """line 2 .*'{"text": "c"}' follows the object"""),
        ('{\n"text": "a"\n}\n', "line 1 does not parse"),
        ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16 text; convert it: `iconv -f UTF-16"),
        ('{"text": "a"}\n{"text": ["b"]}\n', "line 2: 'text' is a list, not text"),
        ('{"text": "a"}\n{"text": 2.5}\n', "line 2: 'text' is a value of type float, not text"),
    ],
)
def test_faults_of_json_lines_are_located(tmp_path, content, message):
    with pytest.raises(SaelabError, match=rf"^corpus: .*a\.jsonl.*{message}"):
        read(put(tmp_path, "a.jsonl", content))


# -- empty documents


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.parquet", "saved", "a.csv", "folder"])
@pytest.mark.usefixtures("small_parts")
def test_empty_documents_are_left_out_and_counted(tmp_path, tokenizer, kind):
    """Every other document is in a row, wherever the empty ones stand; lanes count them once in all."""
    blank = [" ", " \n", "\t"] if kind == "folder" else [None, " \n", ""]
    texts = [text for n, text in enumerate(TEXTS) for text in ([text, blank[n % 3]] if n % 10 == 0 else [text])]
    corpus = opened(write(tmp_path / kind, [*blank, *texts, *blank]), tokenizer)
    assert corpus.empty_documents() is None, "nothing was read yet"
    found = documents(list(corpus.train_rows(seed=0))) + documents(corpus.held_out_rows(10**9))
    decoded = {tokenizer.decode(document[:-1]) for document in found}
    assert decoded <= set(TEXTS) and len(decoded) >= len(TEXTS) - 2 and set(found.values()) == {1}
    report = "26 of 226 documents are empty (null, missing or blank) and were left out"
    assert corpus.empty_documents() == report
    again = opened(tmp_path / kind, tokenizer)
    for lane in range(3):
        list(again.train_rows(seed=0, lane=lane, lanes=3))
    assert again.empty_documents() == report


def test_rows_resume_beside_empty_documents(tmp_path, tokenizer):
    texts = [text for n, text in enumerate(TEXTS[:60]) for text in ([None, text, " "] if n % 4 == 0 else [text])]
    path = write(tmp_path / "a.jsonl", texts)
    check_resuming(lambda: opened(path, tokenizer))
    check_resuming(lambda: opened(path, tokenizer), lane=1, lanes=2)


@pytest.mark.parametrize("column", [None, "input_ids"])
def test_empty_rows_of_token_ids(tmp_path, tokenizer, column):
    path = write(tmp_path / "a.jsonl", [[], *tokenised(), None], "input_ids")
    corpus = opened(path, tokenizer, text_column=column)
    rows = [*corpus.train_rows(seed=0), *corpus.held_out_rows(10**9)]
    assert sorted(row.tolist() for row in rows) == sorted(tokenised())
    assert corpus.empty_documents().startswith("2 of 52 documents are empty")


def test_a_corpus_without_empty_documents_reports_none(tmp_path, tokenizer):
    corpus = opened(write(tmp_path / "a.jsonl", [*TEXTS, EOT]), tokenizer)
    list(corpus.train_rows(seed=0))
    assert corpus.empty_documents() is None
