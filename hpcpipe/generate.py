"""Text from a model: asks for the logits of what stands so far, draws the next token, starts over.

In go a callable, int32 ids -> float32 [ids, vocab] logits, and a tokenizer; out comes text, a few characters at a time.
The model keeps no state between tokens, so every token costs one forward pass over the window.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpcpipe.config import UserError
from hpcpipe.data import open_tokenizer, separator

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character whose last bytes are still to come


class Logits(Protocol):
    """A model that sees up to ``length`` ids and gives a row of logits [vocab] for each."""

    length: int

    def __call__(self, ids: NDArray[np.int32], /) -> NDArray[np.float32]: ...


def generate(
    logits: Logits,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
) -> str:
    """Continues ``prompt`` by up to ``tokens`` tokens, shows it as it grows (by default on stdout) and returns it.

    ``tokenizer`` is a ``tokenizers.Tokenizer`` or the path of a tokenizer.json. Temperature 0 always takes the
    likeliest token, ``top_k`` 0 considers all. The same seed draws the same text. Stops at the end of a document.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = open_tokenizer(tokenizer)
    write = show or _to_stdout
    stop = separator(tokenizer)
    ids = list(tokenizer.encode(prompt, add_special_tokens=False).ids)
    if not ids and stop is None:
        raise UserError("generate: the prompt is empty; give the model something to continue with --prompt")
    known = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    drawn = sample(logits, ids or [stop], tokens, temperature, top_k, seed, stop, known)
    pieces = []
    for piece in _text(tokenizer, ids, prompt, drawn):
        write(piece)
        pieces.append(piece)
    if show is None:
        _to_stdout("\n")
    return "".join(pieces)


def sample(
    logits: Logits,
    prompt: Sequence[int],
    count: int,
    temperature: float,
    top_k: int,
    seed: int,
    stop: int | None = None,
    known: int | None = None,
) -> Iterator[int]:
    """Up to ``count`` ids after ``prompt`` (1 or more), ending before ``stop``; only ids below ``known`` are drawn."""
    for name, value in (("tokens", count), ("temperature", temperature), ("top-k", top_k), ("seed", seed)):
        if not 0 <= value < float("inf"):
            raise UserError(f"generate: {name} is {value}, expected 0 or more; change --{name}")
    random = np.random.default_rng(seed)
    ids = list(prompt)
    for _ in range(count):
        window = np.asarray(ids[-logits.length :], np.int32)
        row = np.asarray(logits(window)[len(window) - 1], np.float64)[:known]
        if not np.isfinite(row).all():
            raise UserError(
                f"generate: {np.count_nonzero(~np.isfinite(row))} of {len(row)} logits are not finite after {len(ids)} "
                "tokens; the training behind this checkpoint has diverged, take an earlier one"
            )
        token = draw(row, temperature, top_k, random)
        if token == stop:
            return
        ids.append(token)
        yield token


def draw(row: NDArray[np.float64], temperature: float, top_k: int, random: np.random.Generator) -> int:
    """One index of ``row`` with probability softmax(row / temperature), among the ``top_k`` largest."""
    if temperature == 0:
        return int(row.argmax())
    considered = np.arange(len(row))
    if 0 < top_k < len(row):
        # A stable order: equal logits are considered from the lowest id up.
        considered = np.argsort(-row, kind="stable")[:top_k]
    weights = np.cumsum(np.exp((row[considered] - row.max()) / temperature))
    return int(considered[np.searchsorted(weights, random.random() * weights[-1], side="right")])


def _text(tokenizer: Any, prompt: Sequence[int], text: str, drawn: Iterable[int]) -> Iterator[str]:
    """The prompt, then what each token adds to the text; a character in several tokens comes out with its last one."""
    yield text
    ids, before, shown = list(prompt), len(tokenizer.decode(list(prompt), skip_special_tokens=False)), ""
    for token in drawn:
        ids.append(token)
        grown = tokenizer.decode(ids, skip_special_tokens=False)[before:]
        if not grown.endswith(UNFINISHED):
            yield grown[len(shown) :]
            shown = grown
    yield tokenizer.decode(ids, skip_special_tokens=False)[before + len(shown) :]


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
