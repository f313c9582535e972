"""Sampling: the distribution asked for, the same text for the same seed, and text that grows by whole characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcpipe import data
from hpcpipe.config import UserError
from hpcpipe.generate import draw, generate, sample


class Counter:
    """A model that is sure that ``n + 1`` comes after ``n``; it notes what it was asked."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length
        self.asked: list[list[int]] = []

    def __call__(self, ids: NDArray[np.int32], /) -> NDArray[np.float32]:
        assert ids.dtype == np.int32 and len(ids) <= self.length
        self.asked.append(ids.tolist())
        return np.where(np.arange(self.vocab) == (ids[:, None] + 1) % self.vocab, 9.0, 0.0).astype(np.float32)


def test_the_last_row_decides_and_the_window_slides() -> None:
    model = Counter(50, 4)
    assert list(sample(model, [3], 6, 0.0, 0, 0)) == [4, 5, 6, 7, 8, 9]
    assert model.asked == [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8]]


def test_a_document_ends_at_the_separator() -> None:
    assert list(sample(Counter(50, 4), [3], 100, 0.0, 0, 0, stop=7)) == [4, 5, 6]


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    assert max(sample(Counter(64, 8), [48], 300, 50.0, 0, 0, known=50)) < 50


def test_a_seed_is_a_text() -> None:
    texts = [list(sample(Counter(50, 4), [3], 40, 5.0, 10, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3), (1.0, 100), (1.0, 1)])
def test_draws_follow_the_softmax(temperature: float, top_k: int) -> None:
    row = np.array([1.0, -1.0, 0.5, 1.0, 0.0, -700.0])
    keep = np.argsort(-row, kind="stable")[: top_k or len(row)]
    expected = np.zeros(len(row))
    expected[keep] = np.exp(row[keep] / temperature)
    expected /= expected.sum()
    random, n = np.random.default_rng(0), 20000
    found = np.bincount([draw(row, temperature, top_k, random) for _ in range(n)], minlength=len(row)) / n
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()


def test_a_cold_temperature_is_the_likeliest_token() -> None:
    row = np.array([0.0, 3.0, 2.9])
    assert {draw(row, 1e-6, 0, np.random.default_rng(i)) for i in range(50)} == {1}
    assert draw(row, 0.0, 0, np.random.default_rng(0)) == 1


def test_a_diverged_model_is_said() -> None:
    class Broken(Counter):
        def __call__(self, ids: NDArray[np.int32], /) -> NDArray[np.float32]:
            return np.full((len(ids), self.vocab), np.nan, np.float32)

    with pytest.raises(UserError, match=r"50 of 50 logits are not finite after 1 tokens; the training .* has diverged"):
        list(sample(Broken(50, 4), [3], 5, 1.0, 0, 0))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((-1, 1.0, 0, 0), "tokens is -1"),
        ((1, -0.5, 0, 0), "temperature is -0.5"),
        ((1, float("nan"), 0, 0), "temperature is nan"),
        ((1, 1.0, -2, 0), "top-k is -2"),
        ((1, 1.0, 0, -3), "seed is -3"),
    ],
)
def test_options_out_of_range(values: tuple[int, float, int, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(sample(Counter(50, 4), [3], *values))


def test_text_grows_by_whole_characters(tmp_path: Path) -> None:
    """A tokenizer of bare bytes: every character of four tokens is shown once, when its last byte has come."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([data.SEPARATORS[0]])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "héllo 🙂日!"
    script = tokenizer.encode(text).ids

    class Script:
        length = 100

        def __call__(self, ids: NDArray[np.int32], /) -> NDArray[np.float32]:
            logits = np.zeros((len(ids), tokenizer.get_vocab_size()), np.float32)
            logits[-1, (*script, tokenizer.token_to_id(data.SEPARATORS[0]))[len(ids) - 2]] = 100
            return logits

    shown: list[str] = []
    made = generate(Script(), tmp_path / "tokenizer.json", "> ", tokens=99, temperature=0.0, show=shown.append)
    assert made == "".join(shown) == "> " + text
    assert [s for s in shown if s] == ["> ", *text]


def test_an_empty_prompt_begins_a_document(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(UserError, match=r"the prompt is empty"):
        generate(Counter(2, 4), bare, "", show=lambda _: None)
    bare.add_special_tokens([data.SEPARATORS[0]])
    model = Counter(2, 4)
    generate(model, bare, "", tokens=1, temperature=0.0, show=lambda _: None)
    assert model.asked == [[1]]
