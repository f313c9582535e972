"""Text becomes tokens: trains a byte-level BPE on a sample, encodes, writes the folder ``data.Dataset`` opens.

In goes a ``corpus``; out come train.bin, val.bin, tokenizer.json and, last, the manifest whose rename makes them a
dataset. A few MB are in memory at a time, however much text there is. Which split a document belongs to, and which
text the tokenizer learns from, depend on content only: the same text gives the same bytes on every machine, and
copies of a document end up on the same side.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hpcpipe import data
from hpcpipe.config import UserError
from hpcpipe.corpus import STDLIB, Corpus, Piece, find
from hpcpipe.data import Dataset, Split

BLOCK = 1 << 20  # tokens of a token file read at once
GROUP = 1 << 22  # characters encoded at once
SAMPLE = 1 << 10  # bytes of text the tokenizer learns from, for every token of its vocabulary
ALPHABET = 256  # every byte is a token, so every text can be written


def prepare(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    val_fraction: float = 0.05,
    tokenizer: str | os.PathLike[str] | None = None,
    column: str = "text",
    suffixes: Sequence[str] = (),
    errors: str = "stop",
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Dataset:
    """Makes the dataset ``out`` from text files and folders (with ``suffixes`` beside the usual ones) and opens it.

    ``vocab_size`` is what the byte-level BPE is trained to, unless ``tokenizer`` names a tokenizer.json to use;
    ``val_fraction`` is the share of documents held out, ``column`` the text of a JSON line or parquet row, ``errors``
    stop or skip. UserError for whatever is wrong with the input; ``out`` then holds no dataset, or the one it had.
    """
    begun, folder = time.monotonic(), Path(out)
    _check(vocab_size, val_fraction, errors)
    _check_out(folder, force)
    names = [str(os.fspath(source)) for source in sources]
    files = find(names, suffixes)
    corpus = Corpus(files, column, errors == "skip" or names == [STDLIB])
    encoder, separator = _tokenizer(corpus, vocab_size, tokenizer)
    vocab = max(encoder.get_vocab(with_added_tokens=True).values()) + 1
    kind = np.dtype("<u2" if vocab <= data.LARGEST_ID["uint16"] + 1 else "<u4")
    try:
        with _output(folder, kind, separator) as output:
            for pieces in _groups(corpus.pieces()):
                _encode(pieces, encoder, val_fraction, output)
            if not output.documents:
                raise UserError(f"prepare: none of {len(files)} files has a document ({len(corpus.skipped)} skipped)")
            output.balance(val_fraction)
            source = {"from": names, "files": len(files), "skipped": len(corpus.skipped)}
            manifest = data.manifest(kind.name, vocab, separator, output.splits(), source)
            output.commit({data.TOKENIZER: encoder.to_str(pretty=True), data.MANIFEST: manifest})
    except OSError as error:
        raise UserError(f"prepare: {error.filename or folder} cannot be written ({error.strerror})") from None
    made = Dataset.open(folder)
    say(_summary(made, output, corpus, time.monotonic() - begun))
    return made


def _summary(made: Dataset, output: Output, corpus: Corpus, seconds: float) -> str:
    train, val = (made.splits[name] for name in data.SPLITS)
    million = output.characters / 1e6
    made_of = f"{output.documents:,} documents, {million:,.1f} million characters, {len(corpus.files):,} files"
    each = output.characters / (train.tokens + val.tokens)
    lines = [
        f"{made.path}: {made_of}",
        f"{train.tokens:,} tokens to train on, {val.tokens:,} to validate with, {each:.2f} characters each",
        f"vocabulary {made.vocab:,} ({made.dtype}), digest {made.digest}, {seconds:.1f} s",
    ]
    if corpus.skipped:
        more = f" and {len(corpus.skipped) - 1} more" if len(corpus.skipped) > 1 else ""
        lines.append(f"skipped {corpus.skipped[0]}{more}")
    return "\n".join(lines)


# --- checks before anything is read


def _check(vocab_size: int, val_fraction: float, errors: str) -> None:
    if not ALPHABET < vocab_size <= data.LARGEST_ID["uint32"]:
        raise UserError(
            f"prepare: a vocabulary of {vocab_size} is outside {ALPHABET + 1} to {data.LARGEST_ID['uint32']}: "
            f"{ALPHABET} bytes and the separator come first; change --vocab"
        )
    if not 0 <= val_fraction < 1:
        raise UserError(f"prepare: a validation share of {val_fraction} is not in [0, 1); change --val")
    if errors not in ("stop", "skip"):
        raise UserError(f'prepare: errors is "{errors}", expected stop or skip')


def _check_out(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"prepare: {folder} is a file; give another --out")
    if folder.is_dir() and not force:
        found = sorted(f.name for f in folder.iterdir() if f.suffix != ".part")
        if data.MANIFEST in found:
            raise UserError(f"prepare: {folder} already holds a dataset; give another --out, or --force to replace it")
        if found:
            raise UserError(
                f"prepare: {folder} is not empty ({', '.join(found[:3])}{', ...' * (len(found) > 3)}); "
                "give another --out, or --force to write beside that"
            )


# --- tokens


def _tokenizer(corpus: Corpus, vocab_size: int, path: str | os.PathLike[str] | None) -> tuple[Any, int]:
    """(tokenizer, number of the token between documents)."""
    encoder = data.open_tokenizer(path) if path else _trained(corpus, vocab_size)
    separator = data.separator(encoder)
    if separator is None:
        raise UserError(
            f"prepare: {path} has none of {' '.join(data.SEPARATORS)} to put between documents; add the first to it"
        )
    # A document that spells the separator out gets ordinary tokens.
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder, separator


def _trained(corpus: Corpus, vocab_size: int) -> Any:
    """A byte-level BPE in the manner of GPT-2 (Radford et al. 2019), trained on a sample of the corpus."""
    data.require_tokenizers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[data.SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    size = SAMPLE * vocab_size
    share = size / max(size, sum(file.stat().st_size for file in corpus.files if file.exists()))
    encoder.train_from_iterator((p.text for p in corpus.pieces() if _position(p.text, b"sample") < share), trainer)
    return encoder


def _position(text: str, purpose: bytes) -> float:
    """Where a text stands in [0, 1), by its content."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest(), "big") / 2**64


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _encode(pieces: Sequence[Piece], encoder: Any, val_fraction: float, output: Output) -> None:
    fast = getattr(encoder, "encode_batch_fast", encoder.encode_batch)  # without character offsets
    for piece, encoding in zip(pieces, fast([p.text for p in pieces], add_special_tokens=False), strict=True):
        if piece.first:
            output.choose("val" if _position(piece.text, b"split") < val_fraction else "train")
        output.add(encoding.ids, len(piece.text), piece.last)


# --- writing


class Writer:
    """One token file under a temporary name, with its running counts and checksum."""

    def __init__(self, path: Path, kind: np.dtype[Any], separator: int) -> None:
        self.path, self.kind, self.separator = path, kind, separator
        self.stream = path.open("w+b")
        self.tokens = self.documents = self.crc = 0

    def write(self, ids: Any) -> None:
        tokens = np.asarray(ids, self.kind)
        self.stream.write(tokens.tobytes())
        self._count(tokens)

    def _count(self, tokens: NDArray[Any]) -> None:
        self.tokens += len(tokens)
        self.documents += int(np.count_nonzero(tokens == self.separator))
        self.crc = zlib.crc32(tokens.tobytes(), self.crc)

    def blocks(self, begin: int, end: int) -> Iterator[NDArray[Any]]:
        """The tokens [begin, end) again, a few MB at a time."""
        self.stream.seek(begin * self.kind.itemsize)
        for at in range(begin, end, BLOCK):
            yield np.frombuffer(self.stream.read(min(BLOCK, end - at) * self.kind.itemsize), self.kind)

    def truncate(self, tokens: int) -> None:
        self.stream.truncate(tokens * self.kind.itemsize)
        self.tokens = self.documents = self.crc = 0
        for block in self.blocks(0, tokens):
            self._count(block)

    def split(self, file: str) -> Split:
        return Split(file, self.tokens, self.documents, f"{self.crc:08x}")


class Output:
    """The folder while it is made: a writer per split, the one the current document goes to, and the totals."""

    def __init__(self, folder: Path, kind: np.dtype[Any], separator: int) -> None:
        self.folder, self.kind, self.separator = folder, kind, separator
        self.writers = {name: self._writer(f"{name}.bin") for name in data.SPLITS}
        self.current = self.writers["train"]
        self.documents = self.characters = 0

    def _writer(self, name: str) -> Writer:
        return Writer(self.folder / f"{name}.part", self.kind, self.separator)

    def choose(self, split: str) -> None:
        self.current = self.writers[split]

    def add(self, ids: list[int], characters: int, last: bool) -> None:
        self.current.write([*ids, self.separator] if last else ids)
        self.documents += last
        self.characters += characters

    def balance(self, val_fraction: float) -> None:
        """Gives validation the last tokens of all where few large documents fell too unevenly, such as one file."""
        train, val = self.writers["train"], self.writers["val"]
        total = train.tokens + val.tokens
        target = max(1, round(val_fraction * total))
        if not val_fraction or target / 2 <= val.tokens <= 2 * target:
            return
        held, end = self._writer("held.bin"), total - target
        for writer, begin in ((train, min(end, train.tokens)), (val, max(0, end - train.tokens))):
            for block in writer.blocks(begin, writer.tokens):
                held.write(block)
        if end > train.tokens:
            for block in val.blocks(0, end - train.tokens):
                train.write(block)
        else:
            train.truncate(end)
        val.stream.close()
        self.writers["val"] = held

    def splits(self) -> dict[str, Split]:
        return {name: writer.split(f"{name}.bin") for name, writer in self.writers.items()}

    def commit(self, texts: Mapping[str, str]) -> None:
        """Puts everything in its place, ``texts`` last; until the last rename the folder holds no dataset."""
        for name, text in texts.items():
            with (self.folder / f"{name}.part").open("w", encoding="utf-8") as stream:
                stream.write(text)
                _to_disk(stream)
        for writer in self.writers.values():
            _to_disk(writer.stream)
        (self.folder / data.MANIFEST).unlink(missing_ok=True)
        for name, writer in self.writers.items():
            writer.path.replace(self.folder / f"{name}.bin")
        for name in texts:
            (self.folder / f"{name}.part").replace(self.folder / name)
        directory = os.open(self.folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def _to_disk(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _output(folder: Path, kind: np.dtype[Any], separator: int) -> Iterator[Output]:
    """An Output that leaves no temporary file behind, whatever happens, nor a folder made for nothing."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    output = None
    try:
        output = Output(folder, kind, separator)
        yield output
    finally:
        for writer in output.writers.values() if output else ():
            with suppress(OSError):  # a full disk fails again when the buffer is flushed
                writer.stream.close()
        for name in (*(f"{split}.bin" for split in data.SPLITS), "held.bin", data.TOKENIZER, data.MANIFEST):
            (folder / f"{name}.part").unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
