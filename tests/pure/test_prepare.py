"""Text into tokens: what goes in comes out, the same bytes every time, and a sentence for text that cannot be used."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe import corpus, data
from hpcpipe import prepare as prepare_module
from hpcpipe.config import UserError
from hpcpipe.corpus import Corpus, find
from hpcpipe.data import SEPARATORS, Dataset
from hpcpipe.prepare import prepare

pytest.importorskip("tokenizers")

SMALL = 300  # a vocabulary that trains in milliseconds


def quiet(*_: object) -> None:
    pass


def made(sources: Any, out: Path, **options: Any) -> Dataset:
    options = {"vocab_size": SMALL, "say": quiet} | options
    return prepare([str(s) for s in sources], out, **options)


def documents(dataset: Dataset, split: str) -> list[str]:
    """The texts of a split again."""
    tokenizer = data.open_tokenizer(dataset.tokenizer)
    ids = dataset.tokens[split].astype(int)
    ends = np.flatnonzero(ids == dataset.separator)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    parts = np.split(ids, ends + 1)[: len(ends)]
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "inner" / ".git").mkdir(parents=True)
    (folder / "__pycache__").mkdir()
    for i in range(60):
        where = folder / "inner" if i % 2 else folder
        (where / f"{i:02}.txt").write_text(
            f"document {i}: größer, naïve, 日本語 🙂\n\twith tabs   and spaces\r\n" * (i % 5 + 1)
        )
    (folder / "inner" / ".git" / "hidden.txt").write_text("hidden")
    (folder / "__pycache__" / "cached.py").write_text("cached")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / "empty.txt").write_bytes(b"")
    return folder


def expected(folder: Path) -> list[str]:
    return sorted(f.read_bytes().decode() for f in folder.rglob("[0-9]*.txt"))


def test_every_document_comes_out_as_it_went_in(texts: Path, tmp_path: Path) -> None:
    dataset = made([texts], tmp_path / "out", val_fraction=0.3)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == expected(texts)
    assert len(val) == dataset.splits["val"].documents and len(train) == dataset.splits["train"].documents
    assert 5 < len(val) < 35
    assert dataset.vocab <= SMALL and dataset.dtype == "uint16"
    dataset.verify()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(texts: Path, tmp_path: Path) -> None:
    one = made([texts], tmp_path / "one")
    moved = tmp_path / "moved"
    texts.rename(moved)
    again = moved / "inner" / ".." / "00.txt"  # no file counts twice
    other = made([moved, moved / "inner", again], tmp_path / "other")
    assert one.digest == other.digest
    assert one.tokenizer.read_bytes() == other.tokenizer.read_bytes()


def test_copies_of_a_document_stay_on_one_side(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i % 40}"}) for i in range(400)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n\n")
    dataset = made([tmp_path / "x.jsonl"], tmp_path / "out", val_fraction=0.25)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert len(train) + len(val) == 400 and train and val and not set(train) & set(val)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_large_documents_still_leave_something_to_validate_with(tmp_path: Path, count: int) -> None:
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text("".join(f"line {n} of {i}\n" for n in range(4000)))
    dataset = made([tmp_path], tmp_path / "out", val_fraction=0.1)
    tokens = {name: split.tokens for name, split in dataset.splits.items()}
    assert 0.05 <= tokens["val"] / sum(tokens.values()) <= 0.2
    assert sum(split.documents for split in dataset.splits.values()) == count
    dataset.verify()
    ids = np.concatenate([dataset.tokens["train"], dataset.tokens["val"]]).tolist()
    text = data.open_tokenizer(dataset.tokenizer).decode(ids, skip_special_tokens=False)
    assert sorted(text.split(SEPARATORS[0])[:-1]) == sorted((tmp_path / f"{i}.txt").read_text() for i in range(count))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("side", ["train", "val"])
def test_balance_moves_the_border_and_no_token(tmp_path: Path, side: str, share: float) -> None:
    """Whatever fell where, all tokens stay in order and the last ``share`` of them validates."""
    kind, total = np.dtype("<u2"), 3000
    numbers = [*range(1, total), 0]
    cut = 2990 if side == "train" else 10
    with prepare_module._output(tmp_path, kind, 0) as output:
        for name, ids in (("train", numbers[:cut]), ("val", numbers[cut:])):
            output.choose(name)
            output.add(ids, 1, False)
        output.balance(share)
        output.commit({})
        splits = output.splits()
    found = [np.fromfile(tmp_path / split.file, kind) for split in splits.values()]
    assert np.concatenate(found).tolist() == numbers
    target = round(share * total)
    assert target / 2 <= splits["val"].tokens <= 2 * target
    for split in splits.values():
        assert split.crc32 == data.crc32(tmp_path / split.file)
    assert splits["val"].documents == 1


def test_no_validation_is_a_choice(texts: Path, tmp_path: Path) -> None:
    dataset = made([texts], tmp_path / "out", val_fraction=0.0)
    assert dataset.splits["val"].tokens == 0 and dataset.splits["train"].documents == 60
    with pytest.raises(UserError, match=r"val.bin has 0 tokens, one window needs 11"):
        dataset.windows("val", 10)


def test_large_files_pass_in_pieces(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into tiny pieces or whole, the text is the same; every character may fall on a border."""
    whole = sorted(expected(texts))
    for piece in (1, 2, 3, 7, 50):
        monkeypatch.setattr(corpus, "PIECE", piece)
        pieces = list(Corpus(find([str(texts)]), "text", False).pieces())
        joined, current = [], ""
        for p in pieces:
            assert p.text and p.first == (current == "")
            current += p.text
            if p.last:
                joined.append(current)
                current = ""
        assert sorted(joined) == whole and current == ""
        assert max(len(p.text) for p in pieces) <= max(90, 5 * piece)
    dataset = made([texts], tmp_path / "out", val_fraction=0.3)
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == whole


def test_text_that_spells_the_separator_out_is_only_text(tmp_path: Path) -> None:
    text = f"before {SEPARATORS[0]} after\n"
    (tmp_path / "a.txt").write_text(text)
    dataset = made([tmp_path], tmp_path / "out", val_fraction=0.0)
    assert dataset.splits["train"].documents == 1
    assert documents(dataset, "train") == [text]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n", encoding="utf-8-sig")
    assert documents(made([tmp_path], tmp_path / "out", val_fraction=0.0), "train") == ["text\n"]


def test_a_given_tokenizer_is_used_as_it_is(texts: Path, tmp_path: Path) -> None:
    first = made([texts], tmp_path / "first")
    (tmp_path / "new.txt").write_text("other text, never seen: ßø\n" * 3)
    second = made([tmp_path / "new.txt"], tmp_path / "second", tokenizer=first.tokenizer, val_fraction=0.0)
    assert (second.vocab, second.separator) == (first.vocab, first.separator)
    assert documents(second, "train") == ["other text, never seen: ßø\n" * 3]


def test_a_large_vocabulary_takes_wide_ids(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    (tmp_path / "a.txt").write_text("some text\n")
    tokenizer = data.open_tokenizer(made([tmp_path], tmp_path / "out").tokenizer)
    tokenizer.add_tokens([AddedToken(f"<word {i}>") for i in range(70000)])
    tokenizer.save(str(tmp_path / "large.json"))
    (tmp_path / "a.txt").write_text("a <word 69999> b\n")
    dataset = made([tmp_path / "a.txt"], tmp_path / "wide", tokenizer=tmp_path / "large.json", val_fraction=0.0)
    assert dataset.dtype == "uint32" and dataset.vocab > 70000
    assert int(dataset.tokens["train"].max()) == dataset.vocab - 1
    assert documents(dataset, "train") == ["a <word 69999> b\n"]


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "bare.json"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"bare.json has none of <\|endoftext\|> .* to put between documents"):
        made([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "bare.json")


# --- JSON lines and parquet


def test_json_lines_by_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "body": "one"}\n\n{"body": ""}\r\n{"body": "t\\u00e9 \\ud83d\\ude42"}')
    dataset = made([tmp_path], tmp_path / "out", column="body", val_fraction=0.0)
    assert documents(dataset, "train") == ["one", "té 🙂"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "line 2 is not a JSON record (Expecting"),
        (b"[1]", "line 2 is not a JSON record (expected an object, found list)"),
        (b'{"txt": "a", "n": 1}', 'line 2 is not a JSON record (it has no text "text" among txt, n)'),
        (b'{"text": 3}', 'line 2 is not a JSON record (it has no text "text" among text)'),
        (b"{}", 'it has no text "text" among no keys'),
        (b'{"text": "a\xff"}', "line 2 is not UTF-8 (byte 0xff at offset 27)"),
        (b'{"text": "\\ud83d"}', "line 2 has half of a surrogate pair"),
        (b"[" * 100000, "line 2 is not a JSON record"),
    ],
)
def test_a_line_that_is_no_record(tmp_path: Path, line: bytes, sentence: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(UserError) as caught:
        made([tmp_path], tmp_path / "out")
    assert sentence in str(caught.value) and "--errors skip" in str(caught.value)
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    dataset = made([tmp_path], tmp_path / "out", errors="skip", val_fraction=0.0, say=said.append)
    assert documents(dataset, "train") == ["one", "three"]
    assert "skipped" in said[0] and sentence in said[0]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"row {i}" for i in range(1000)]
    table = pyarrow.table({"id": list(range(1002)), "text": [*rows, None, ""]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    dataset = made([tmp_path], tmp_path / "out", val_fraction=0.2)
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(rows)

    with pytest.raises(UserError, match=r'has no column "body" of strings among id \(int64\), text \(string\)'):
        made([tmp_path], tmp_path / "none", column="body")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a.parquet is not readable parquet"):
        made([tmp_path], tmp_path / "none")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet needs the package pyarrow; install it with `pip install pyarrow`"):
        made([tmp_path], tmp_path / "out")


# --- sentences


def test_text_that_is_not_utf8(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 64)
    bad = texts / "bad.txt"
    bad.write_bytes(b"fine\n" * 100 + "caf\u00e9".encode("latin-1") + b"\n" * 100)
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 \(byte 0xe9 at offset 503\); repair it, or leave"):
        made([texts], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bad.write_bytes(b"fine\n" + "🙂".encode()[:3])
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 \(byte 0xf0 at offset 5\)"):
        made([texts], tmp_path / "out")
    said: list[str] = []
    dataset = made([texts], tmp_path / "out", errors="skip", say=said.append)
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == expected(texts)
    assert said[0].splitlines()[-1].startswith(f"skipped {bad} is not UTF-8") and "more" not in said[0]


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"there is no text in .*; looked for \.c .*\.py"):
        made([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match=r"there is no file or folder .*none"):
        made([tmp_path / "none"], tmp_path / "out")
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 files has a document \(0 skipped\)"):
        made([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_named_alone_and_other_suffixes(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("read me\n")
    (tmp_path / "a.lua").write_text("lua\n")
    assert documents(made([tmp_path / "README"], tmp_path / "one", val_fraction=0.0), "train") == ["read me\n"]
    dataset = made([tmp_path], tmp_path / "two", suffixes=["lua"], val_fraction=0.0)
    assert "lua\n" in documents(dataset, "train")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocab_size": 256}, "a vocabulary of 256 is outside 257 to"),
        ({"val_fraction": 1.0}, "a validation share of 1.0 is not in"),
        ({"val_fraction": -0.1}, "a validation share of -0.1 is not in"),
        ({"val_fraction": float("nan")}, "a validation share of nan is not in"),
        ({"errors": "ignore"}, 'errors is "ignore", expected stop or skip'),
    ],
)
def test_options_out_of_range(texts: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        made([texts], tmp_path / "out", **options)
    assert sentence in str(caught.value)


def test_what_is_there_stays_unless_forced(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = made([texts], out)
    with pytest.raises(UserError, match=r"already holds a dataset; give another --out, or --force"):
        made([texts / "inner"], out)
    assert Dataset.open(out).digest == first.digest
    second = made([texts / "inner"], out, force=True)
    assert second.digest != first.digest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"mine is not empty \(thesis.tex\)"):
        made([texts], tmp_path / "mine")
    made([texts], tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    with pytest.raises(UserError, match=r"README is a file; give another --out"):
        (tmp_path / "README").write_text("x")
        made([texts], tmp_path / "README")


@pytest.mark.parametrize("moment", ["write", "commit"])
def test_a_full_disk_leaves_what_was_there(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out"
    digest = made([texts], out).digest

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = prepare_module.Writer if moment == "write" else prepare_module
    monkeypatch.setattr(owner, "write" if moment == "write" else "_to_disk", full)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(UserError, match=rf"{folder} cannot be written \(No space left on device\)"):
            made([texts / "inner"], folder, force=True)
    assert Dataset.open(out).digest == digest
    assert not list(out.glob("*.part")) and not (tmp_path / "new").exists()


def test_a_run_cut_short_is_no_dataset(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first rename and the last the folder must not look whole."""
    out = tmp_path / "out"
    made([texts], out)
    replace, seen = Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((Path(target).name, (out / data.MANIFEST).exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    made([texts], out, force=True)
    assert seen == [(n, False) for n in ("train.bin", "val.bin", "tokenizer.json", "dataset.json")]


def test_python_stdlib_is_found_without_its_tests_and_packages() -> None:
    files = find([corpus.STDLIB])
    names = {f.name for f in files}
    assert {"argparse.py", "os.py"} <= names and len(files) > 200
    assert not any({"site-packages", "dist-packages", "test", "tests"} & set(f.parts[-3:-1]) for f in files)
