"""Token batches as a pure function of (seed, step, micro, replica) over a memory-mapped file.

The stream has no state: sequences are numbered through the whole run, an epoch's order is a keyed bijection of the
windows, and a step's numbers are the same however many replicas share it. So a checkpoint needs only the step, and a
run that changes its number of replicas repeats no token and skips none. In goes a folder made by ``prepare``; out come
int32 ids and targets. The format of that folder has its home here too.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcpipe.config import Config, UserError

MANIFEST = "dataset.json"
FORMAT = 1
TOKENIZER = "tokenizer.json"
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # ours and GPT-2's, Llama 3's, Llama 2's, Gemma's
SPLITS = ("train", "val")
BLOCK = 1024  # windows whose order is computed at once
LARGEST_ID = {"uint16": 2**16 - 1, "uint32": 2**31 - 1}  # batches are int32

Ids = NDArray[np.int32]
Words = NDArray[np.uint64]


# --- the order of the windows


def permute(positions: NDArray[Any], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The keyed bijection of range(size) at ``positions`` (any shape, each in [0, size)).

    A balanced Feistel network on the next power of four, walked until it lands inside (Black & Rogaway 2002, "cycle
    walking": fewer than four rounds of walking on average). Any position costs the same, nothing is stored.
    """
    half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode()).digest(), "<u8").astype(np.uint64)
    walked = np.asarray(positions).astype(np.uint64)
    outside = np.ones(walked.shape, bool)
    while outside.any():
        walked[outside] = _feistel(walked[outside], keys, half, mask)
        outside = walked >= np.uint64(size)
    return walked.astype(np.int64)


@lru_cache(maxsize=64)
def _block(size: int, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    """Positions [number*BLOCK, (number+1)*BLOCK) of an epoch's order; file order for epoch -1. A step asks for few at a
    time, and a thousand cost as much as one."""
    positions = np.arange(number * BLOCK, min(size, (number + 1) * BLOCK))
    return positions if epoch < 0 else permute(positions, size, seed, epoch)


def _feistel(x: Words, keys: Words, half: np.uint64, mask: np.uint64) -> Words:
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def sequence(step: int, replica: int, micro: int, row: int, *, batch: int, microbatch: int, replicas: int) -> int:
    """The number of a sequence in the whole run: a step's numbers are the same for every number of replicas."""
    return step * batch + replica * (batch // replicas) + micro * microbatch + row


# --- the folder


class Split(NamedTuple):
    """One token file: its name in the folder, tokens, documents, and CRC-32 of its bytes in hexadecimal."""

    file: str
    tokens: int
    documents: int
    crc32: str


@dataclass(frozen=True)
class Dataset:
    """An opened folder of tokens. ``digest`` identifies its content wherever it lies."""

    path: Path
    dtype: str
    vocab: int
    separator: int
    splits: Mapping[str, Split]
    digest: str
    tokens: Mapping[str, NDArray[Any]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Dataset:
        """The dataset in a folder, after checking manifest, file sizes and a sample of the ids (a few hundred KB)."""
        if not os.fspath(path):
            raise UserError("data: no dataset is named; set data.path to a folder made by `hpcpipe prepare`")
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"data: {folder} {what}; set data.path to a folder made by `hpcpipe prepare`")
        content = _manifest(folder / MANIFEST)
        tokens = {
            name: _tokens(folder / split.file, split.tokens, content.dtype, name)
            for name, split in content.splits.items()
        }
        for name, split in content.splits.items():
            _check_sample(folder / split.file, tokens[name], content.vocab)
        return cls(folder, *content, tokens)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json these tokens were made with."""
        return self.path / TOKENIZER

    def check(self, config: Config) -> None:
        """UserError where a run's resolved config asks for more than the dataset has."""
        self.windows("train", config.train.length)
        if config.eval.every:
            self.windows("val", config.train.length)
        if config.model.vocab < self.vocab:
            raise UserError(
                f"data: {self.path} has a vocabulary of {self.vocab}, model.vocab is {config.model.vocab}; "
                f"set model.vocab to {self.vocab} or more, or leave it out"
            )

    def windows(self, split: str, length: int) -> int:
        """Windows of ``length`` tokens and one target in a split, the remainder dropped; UserError if there is none."""
        found = (self.splits[split].tokens - 1) // length
        if found < 1:
            raise UserError(
                f"data: {self.path / self.splits[split].file} has {self.splits[split].tokens} tokens, one window needs "
                f"{length + 1} (train.length + 1); prepare more text or shorten train.length"
            )
        return found

    def batch(
        self,
        split: str,
        step: int,
        micro: int,
        replica: int,
        *,
        batch: int,
        microbatch: int,
        replicas: int,
        length: int,
        seed: int,
        out: tuple[Ids | None, Ids | None] | None = None,
    ) -> tuple[Ids | None, Ids | None]:
        """(ids, targets), int32 [microbatch*length] each, written into ``out`` where given (None: not wanted).

        Training windows come in a new random order every epoch, validation windows in file order over and over.
        """
        n = microbatch * length
        ids, targets = out or (np.empty(n, np.int32), np.empty(n, np.int32))
        first = sequence(step, replica, micro, 0, batch=batch, microbatch=microbatch, replicas=replicas)
        tokens = self.tokens[split]
        for row, window in enumerate(self.order(split, first, microbatch, length, seed)):
            begin, at = int(window) * length, row * length
            if ids is not None:
                ids[at : at + length] = tokens[begin : begin + length]
            if targets is not None:
                targets[at : at + length] = tokens[begin + 1 : begin + length + 1]
        return ids, targets

    def order(self, split: str, first: int, count: int, length: int, seed: int) -> NDArray[np.int64]:
        """The windows of sequences first, first + 1, ..., also across the end of an epoch; int64 [count]."""
        size, at = self.windows(split, length), 0
        order = np.empty(count, np.int64)
        while at < count:
            epoch, place = divmod(first + at, size)
            block = _block(size, seed, epoch if split == "train" else -1, place // BLOCK)[place % BLOCK :]
            n = min(len(block), count - at)
            order[at : at + n] = block[:n]
            at += n
        return order

    def verify(self) -> None:
        """Read every byte and compare with the checksums; UserError names the file that differs."""
        for split in self.splits.values():
            found = crc32(self.path / split.file)
            if found != split.crc32:
                raise UserError(
                    f"data: {self.path / split.file} has checksum {found}, {MANIFEST} promises {split.crc32}; "
                    "the file is damaged, run `hpcpipe prepare` again"
                )


def crc32(path: Path) -> str:
    """CRC-32 of a file's bytes, 8 hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def digest(dtype: str, vocab: int, splits: Mapping[str, Split]) -> str:
    """16 hexadecimal digits over what a run sees of a dataset: ids, their count and their split."""
    seen = [dtype, vocab, [[name, s.tokens, s.crc32] for name, s in sorted(splits.items())]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def manifest(dtype: str, vocab: int, separator: int, splits: Mapping[str, Split], source: Mapping[str, Any]) -> str:
    """The text of ``dataset.json``; ``source`` says where the tokens came from and is not read again."""
    content = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab": vocab,
        "separator": separator,
        "splits": {name: split._asdict() for name, split in splits.items()},
        "digest": digest(dtype, vocab, splits),
        "source": source,
    }
    return json.dumps(content, indent=2) + "\n"


# --- opening it


class Manifest(NamedTuple):
    """What ``dataset.json`` says, in the order of Dataset's fields."""

    dtype: str
    vocab: int
    separator: int
    splits: Mapping[str, Split]
    digest: str


def _manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"data: {path.parent} has no {MANIFEST}; make the folder with `hpcpipe prepare`") from None
    except OSError as error:
        raise UserError(f"data: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"data: {path} is not valid JSON ({error}); run `hpcpipe prepare` again") from None
    try:
        if content["format"] != FORMAT:
            raise UserError(
                f"data: {path} has format {content['format']}, this program reads {FORMAT}; run `hpcpipe prepare` again"
            )
        splits = {name: _split(content["splits"][name]) for name in SPLITS}
        dtype, vocab, separator = str(content["dtype"]), int(content["vocab"]), int(content["separator"])
        promised = str(content["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"data: {path} is incomplete ({error!r}); run `hpcpipe prepare` again") from None
    _check_ids(path, dtype, vocab, separator)
    if promised != digest(dtype, vocab, splits):
        raise UserError(f"data: {path} was changed after it was written; run `hpcpipe prepare` again")
    return Manifest(dtype, vocab, separator, splits, promised)


def _split(content: Any) -> Split:
    return Split(str(content["file"]), int(content["tokens"]), int(content["documents"]), str(content["crc32"]))


def _check_ids(path: Path, dtype: str, vocab: int, separator: int) -> None:
    if dtype not in LARGEST_ID:
        raise UserError(f"data: {path} has dtype {dtype}, expected {' or '.join(LARGEST_ID)}; prepare it again")
    if not 0 < vocab <= LARGEST_ID[dtype] + 1:
        raise UserError(
            f"data: {path} has a vocabulary of {vocab}, {dtype} holds 1 to {LARGEST_ID[dtype] + 1}; "
            "prepare it again with another vocabulary"
        )
    if not 0 <= separator < vocab:
        raise UserError(f"data: {path} has separator {separator}, outside its vocabulary of {vocab}; prepare it again")


def _tokens(path: Path, count: int, dtype: str, split: str) -> NDArray[Any]:
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size != count * kind.itemsize:
            state = "empty" if not size else "truncated" if size < count * kind.itemsize else "too long"
            raise UserError(
                f"data: {path} is {state}: {size} bytes, {MANIFEST} promises {count} tokens of {kind.itemsize} bytes = "
                f"{count * kind.itemsize}; run `hpcpipe prepare` again"
            )
        if not count and split == "train":
            raise UserError(f"data: {path} is empty: there is nothing to train on; prepare some text")
        return np.asarray(np.memmap(path, kind, "r")) if count else np.empty(0, kind)
    except FileNotFoundError:
        raise UserError(f"data: {path} is missing; run `hpcpipe prepare` again") from None
    except OSError as error:
        raise UserError(f"data: {path} cannot be read ({error.strerror})") from None


def _check_sample(path: Path, tokens: NDArray[Any], vocab: int, blocks: int = 64, length: int = 1024) -> None:
    """Look at the first, the last and evenly spread blocks: a wrong dtype or a foreign file shows at once."""
    for begin in np.unique(np.linspace(0, max(0, len(tokens) - length), blocks).astype(np.int64)):
        block = tokens[begin : begin + length]
        if len(block) and int(block.max()) >= vocab:
            at = int(begin) + int(np.argmax(block >= vocab))
            raise UserError(
                f"data: {path} has id {int(tokens[at])} at token {at}, outside the vocabulary of {vocab}; "
                "the file does not belong to this tokenizer, run `hpcpipe prepare` again"
            )


def open_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The ``tokenizers.Tokenizer`` in a tokenizer.json."""
    tokenizers = require_tokenizers()
    if not Path(path).is_file():
        raise UserError(f"data: there is no tokenizer {os.fspath(path)}; give the path of a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise UserError(f"data: {os.fspath(path)} is not a tokenizer ({error})") from None


def separator(tokenizer: Any) -> int | None:
    """The id of the token that ends a document, if the tokenizer has one."""
    return next((n for n in map(tokenizer.token_to_id, SEPARATORS) if n is not None), None)


def require_tokenizers() -> Any:
    """The module ``tokenizers``, imported only where text is read or written."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
    except ImportError:
        raise UserError("data: the package `tokenizers` is missing; install it with `pip install tokenizers`") from None
    return tokenizers
