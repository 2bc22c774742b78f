"""Reading text: formats, document borders, and messages that name the place of what is wrong."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from rondo.pretrain.data import embedded
from rondo.pretrain.data.corpora import cut, open_corpus
from rondo.pretrain.data.errors import DataError


def documents(path, **options):
    return list(open_corpus(str(path), **options).documents())


def test_text_files_in_order_with_every_byte_decodable(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline\n\n bad \xff\xfe\n")
    (tmp_path / "a.txt").write_text("first \0 file")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    (tmp_path / "sub [1]").mkdir()
    (tmp_path / "sub [1]" / "c?*.txt").write_text("third\n")
    assert documents(tmp_path) == [
        "first \0 file",
        "second\nline\n\n bad \ufffd\ufffd\n",
        "third\n",
    ]


def test_long_text_is_cut_at_blank_lines(tmp_path):
    text = "".join(f"paragraph {i}\n\n" for i in range(1000))
    (tmp_path / "long.txt").write_text(text)
    parts = documents(tmp_path / "long.txt", document_bytes=500)
    assert "".join(parts) == text
    assert all(500 <= len(part) < 520 and part.endswith("\n\n") for part in parts[:-1])
    assert documents(tmp_path / "long.txt", document_bytes=0) == [text]


def test_text_without_blank_lines_is_cut_at_lines():
    parts = list(cut(iter(["x" * 9 + "\n"] * 100), 50))
    assert {len(part) for part in parts} == {100}
    assert list(cut(iter([]), 50)) == []


def test_json_lines(tmp_path):
    rows = [{"text": "one\nline"}, {"text": "two", "other": [1, {"a": None}]}, {"text": ""}]
    lines = [json.dumps(row) for row in rows]
    junk = '{"text": 1, "text": "last key wins \\ud800 \\ud83d\\ude00"}'
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + "\n\n".join([*lines, junk]))
    assert documents(path) == ["one\nline", "two", "", "last key wins \ud800 😀"]


def test_compressed_files(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write('{"body": "packed"}\n')
    corpus = open_corpus(str(tmp_path), text_field="body")
    assert list(corpus.documents()) == ["packed"]
    assert corpus.total_bytes is None


def test_a_long_line(tmp_path):
    text = "ab" * 15_000_000  # more than the reader's block
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "next"}\n')
    first, second = documents(tmp_path / "x.jsonl")
    assert first == text
    assert second == "next"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a"}', r"x\.jsonl:3: no field 'text'; its fields are 'txt'; did you mean 'txt'"),
        ('{"text": 5}', r"x\.jsonl:3: field 'text' is '5' \(int\), expected a string"),
        ('{"text": null}', r"x\.jsonl:3: field 'text' is 'None' \(NoneType\)"),
        ('{"text": "hal', r"x\.jsonl:3: not a JSON object: Unterminated"),
        ('["a"]', r"x\.jsonl:3: expected a JSON object on each line, got list"),
        ("[" * 100_000, r"x\.jsonl:3: not a JSON object"),
    ],
)
def test_json_junk_is_named_by_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n' + line)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "x.jsonl")


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"content": ["one", "two"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    assert documents(path, text_field="content") == ["one", "two"]
    with pytest.raises(DataError, match=r"x\.parquet: no field 'text'; its fields are 'content'"):
        documents(path)
    with pytest.raises(DataError, match=r"x\.parquet: row 1: field 'n' is '1' \(int\)"):
        documents(path, text_field="n")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file"):
        documents(path)


def test_broken_compression_names_the_file(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(b"\x1f\x8b not gzip at all")
    with pytest.raises(DataError, match=r"x\.txt\.gz: cannot be read"):
        documents(tmp_path / "x.txt.gz")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "no such file, folder or corpus"),
        ("stdlib-englsh", "did you mean 'stdlib-english'"),
        ("missing/file.jsonl", "'missing/file.jsonl': no such file"),
        ("nothing here", "no such file, folder or corpus"),
        ("/absent", "no such file, folder or corpus"),
    ],
)
def test_missing_sources(path, message):
    with pytest.raises(DataError, match=message):
        open_corpus(path)


def test_folders_and_files_of_no_use(tmp_path):
    with pytest.raises(DataError, match="empty corpus: no file with one of"):
        open_corpus(str(tmp_path))
    (tmp_path / "x.docx").write_text("")
    with pytest.raises(DataError, match=r"suffix '\.docx'"):
        open_corpus(str(tmp_path / "x.docx"))
    (tmp_path / "train.idx").write_text("")
    with pytest.raises(DataError, match="already prepared"):
        open_corpus(str(tmp_path))


def test_hub_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    corpus = open_corpus("someone/some-text:part")
    with pytest.raises(DataError, match=r"'someone/some-text:part'.*hub\.invalid cannot be reach"):
        next(corpus.documents())


def test_embedded_corpora():
    code = documents("stdlib-code")
    english = documents("stdlib-english")
    assert sum(map(len, code)) > 5e6
    assert sum(map(len, english)) > 1e6
    assert any("def dataclass(" in text for text in code)
    assert not any("site-packages" in str(path) for path in embedded.code_files())
    assert any("The *target list*" in text or "assignment" in text for text in english)
    assert documents("stdlib-english") == english
    docstrings = embedded._docstrings(
        '"""M."""\nif True:\n    class A:\n        "A."\n        def f(self):\n            "F."\n'
        'try:\n    pass\nexcept E:\n    async def g(): "G."\nx = lambda: "no"\n'
    )
    assert docstrings == ["M.", "A.", "F.", "G."]
    assert embedded._docstrings("print 'two'") == []
