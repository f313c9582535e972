"""Documents out of files: finds plain text, JSON lines and parquet, and streams what they hold.

In go paths of files and folders; out comes one pass after another over the same pieces of text in the same order, a
megabyte or a record at a time. What is not UTF-8, not a record or not parquet gets a sentence that says where it is.
"""

from __future__ import annotations

import codecs
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hpcpipe.config import UserError

STDLIB = "python-stdlib"
TEXT = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".sh",
    ".tex",
)
RECORDS = (".jsonl", ".ndjson", ".parquet")
NOT_TEXT = ("site-packages", "dist-packages", "__pycache__", "node_modules")
PIECE = 1 << 20  # bytes of a text file read at once


class Piece(NamedTuple):
    """A stretch of a document. Most documents are one piece; a large text file is cut at line ends."""

    text: str
    first: bool
    last: bool


@dataclass
class Corpus:
    """What to read, and what was met on the way."""

    files: Sequence[Path]
    column: str
    skip: bool
    skipped: list[str] = field(default_factory=list)

    def pieces(self) -> Iterator[Piece]:
        """Every document of every file, in order."""
        self.skipped.clear()
        for file in self.files:
            yield from {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}.get(
                file.suffix.lower(), _text
            )(file, self)

    def refuse(self, sentence: str) -> None:
        """Unreadable text: an error, or one more of those that were skipped."""
        if not self.skip:
            raise UserError(f"prepare: {sentence}; repair it, or leave such text out with --errors skip")
        self.skipped.append(sentence)


def find(sources: Sequence[str], suffixes: Sequence[str] = ()) -> list[Path]:
    """The files to read, each once, in the order of their paths within each source; UserError if there are none."""
    wanted = {*TEXT, *RECORDS, *("." + s.lstrip(".").lower() for s in suffixes)}
    files: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if source == STDLIB:
            found = _walk(Path(sysconfig.get_path("stdlib")), {".py"}, (*NOT_TEXT, "test", "tests"))
        elif path.is_dir():
            found = _walk(path, wanted, NOT_TEXT)
        elif path.is_file():
            found = [path]
        else:
            raise UserError(f"prepare: there is no file or folder {path}; give paths of text, or {STDLIB}")
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise UserError(
            f"prepare: there is no text in {', '.join(sources) or 'nothing'}; looked for {' '.join(sorted(wanted))}"
        )
    return list(files.values())


def _walk(top: Path, wanted: Iterable[str], left_out: Sequence[str]) -> list[Path]:
    """Regular files below a folder by suffix; hidden folders and those ``left_out`` are not entered."""
    found = []
    for folder, inside, names in os.walk(top):
        inside[:] = sorted(d for d in inside if d not in left_out and not d.startswith("."))
        paths = (Path(folder, name) for name in sorted(names))
        found += [path for path in paths if path.suffix.lower() in wanted and path.is_file()]
    return found


def _text(file: Path, corpus: Corpus) -> Iterator[Piece]:
    """One document, cut at line ends into pieces of about PIECE bytes. Nothing of a file that is skipped comes out."""
    with _opened(file) as stream:
        if corpus.skip and not _is_text(stream, file, corpus):
            return
        stream.seek(0)
        ready, first = "", True
        for text in _decoded(stream, file, corpus):
            if ready:
                yield Piece(ready, first, False)
                first = False
            ready = text
        if ready:
            yield Piece(ready, first, True)


def _is_text(stream: BinaryIO, file: Path, corpus: Corpus) -> bool:
    """Whether a file is UTF-8 to its end, found out before its first piece is used."""
    before = len(corpus.skipped)
    for _ in _decoded(stream, file, corpus):
        pass
    return len(corpus.skipped) == before


def _decoded(stream: BinaryIO, file: Path, corpus: Corpus) -> Iterator[str]:
    decoder, offset, rest = codecs.getincrementaldecoder("utf-8")(), 0, ""
    while True:
        block = stream.read(PIECE)
        pending = len(decoder.getstate()[0])
        try:
            text = rest + decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = offset - pending + error.start
            corpus.refuse(f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {at})")
            return
        if not offset:
            text = text.removeprefix("\ufeff")
        offset += len(block)
        end = text.rfind("\n") + 1 if block and len(text) < 4 * PIECE else len(text)
        if end:
            yield text[:end]
        rest = text[end:]
        if not block:
            return


def _json_lines(file: Path, corpus: Corpus) -> Iterator[Piece]:
    offset = 0
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                if line.strip():
                    yield from _document(_field(json.loads(line.decode()), corpus.column))
            except UnicodeDecodeError as error:
                at = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
                corpus.refuse(f"{file}: line {number} is not UTF-8 ({at})")
            except UnicodeEncodeError:
                corpus.refuse(f"{file}: line {number} has half of a surrogate pair, which is not text")
            except (ValueError, RecursionError) as error:
                corpus.refuse(f"{file}: line {number} is not a JSON record ({error})")
            offset += len(line)


def _field(record: Any, column: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if not isinstance(record.get(column), str):
        raise ValueError(f'it has no text "{column}" among {", ".join(map(str, record)) or "no keys"}')
    text: str = record[column]
    text.encode()
    return text


def _parquet(file: Path, corpus: Corpus) -> Iterator[Piece]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"prepare: {file} needs the package pyarrow; install it with `pip install pyarrow`") from None
    try:
        table = parquet.ParquetFile(file)
        column = next((f for f in table.schema_arrow if f.name == corpus.column), None)
        if column is None or str(column.type) not in ("string", "large_string"):
            names = ", ".join(f"{f.name} ({f.type})" for f in table.schema_arrow)
            corpus.refuse(f'{file} has no column "{corpus.column}" of strings among {names}')
            return
        for batch in table.iter_batches(batch_size=256, columns=[corpus.column]):
            for text in batch.column(0).to_pylist():
                yield from _document(text)
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
        corpus.refuse(f"{file} is not readable parquet ({error})")


def _document(text: str | None) -> Iterator[Piece]:
    if text:
        yield Piece(text, True, True)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"prepare: {file} cannot be read ({error.strerror})") from None
