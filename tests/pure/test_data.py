"""The token stream: a bijection per epoch, the same for all numbers of replicas; a sentence for each bad folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe import data
from hpcpipe.config import Config, EvalConfig, ModelConfig, TrainConfig, UserError
from hpcpipe.data import Dataset, Split, permute, sequence

LENGTH = 7


def write(folder: Path, train: Any, val: Any, vocab: int = 1000, dtype: str = "uint16", separator: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    splits = {}
    for name, tokens in zip(data.SPLITS, (train, val), strict=True):
        path = folder / f"{name}.bin"
        path.write_bytes(np.asarray(tokens, np.dtype(dtype).newbyteorder("<")).tobytes())
        splits[name] = Split(path.name, len(tokens), 1, data.crc32(path))
    (folder / data.MANIFEST).write_text(data.manifest(dtype, vocab, separator, splits, {}))
    return folder


def change(folder: Path, **values: Any) -> None:
    """Rewrites the manifest with other values and the digest that belongs to them."""
    path = folder / data.MANIFEST
    content = json.loads(path.read_text()) | values
    splits = {name: Split(**split) for name, split in content["splits"].items()}
    content["digest"] = data.digest(content["dtype"], content["vocab"], splits)
    path.write_text(json.dumps(content))


@pytest.fixture
def counted(tmp_path: Path) -> Dataset:
    """Token k is k: 23 windows of 7 and 4 tokens that are left over."""
    return Dataset.open(write(tmp_path / "set", range(23 * LENGTH + 5), range(500, 520)))


# --- the order


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


@given(st.integers(1, 2**40), st.integers(0, 2**40), st.integers(0, 9))
def test_one_position_alone_is_the_position_in_company(size: int, at: int, seed: int) -> None:
    at %= size
    company = np.array([0, at, size - 1, at])
    together = permute(company, size, seed, 3)
    assert (
        together[1] == together[3] == permute(np.array([at]), size, seed, 3)[0] == permute(np.int64(at), size, seed, 3)
    )
    assert (together >= 0).all() and (together < size).all()


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    size = 5000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in [np.arange(size), *orders[:i]]:
            # Two independent orders agree in about one place, and are uncorrelated to a few times 1/sqrt(size).
            assert np.count_nonzero(one == other) < 12
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_neighbours_are_torn_apart() -> None:
    """Of a random order, the mean distance of neighbours is a third of the size."""
    order = permute(np.arange(20000), 20000, 5, 0)
    assert abs(np.abs(np.diff(order)).mean() / 20000 - 1 / 3) < 0.01


def test_the_order_is_the_same_in_every_version() -> None:
    assert permute(np.arange(10), 10, 0, 0).tolist() == [3, 5, 7, 8, 2, 4, 6, 0, 9, 1]
    assert permute(np.arange(3), 2**33, 12345, 6).tolist() == [5431459753, 5512562210, 1934721985]


# --- the stream


def stream(dataset: Dataset, step: int, batch: int, microbatch: int, replicas: int, seed: int = 3) -> list[list[int]]:
    """The sequences of a step in global order, as (ids..., last target) rows."""
    rows = []
    for replica in range(replicas):
        for micro in range(batch // replicas // microbatch):
            ids, targets = dataset.batch(
                "train",
                step,
                micro,
                replica,
                batch=batch,
                microbatch=microbatch,
                replicas=replicas,
                length=LENGTH,
                seed=seed,
            )
            assert ids.dtype == targets.dtype == np.int32 and ids.shape == targets.shape == (microbatch * LENGTH,)
            for i, t in zip(ids.reshape(-1, LENGTH), targets.reshape(-1, LENGTH), strict=True):
                assert np.array_equal(i[1:], t[:-1])
                rows.append([*i.tolist(), int(t[-1])])
    return rows


def fingerprint(rows: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_the_stream_is_the_same_for_every_number_of_replicas(counted: Dataset) -> None:
    expected = fingerprint([row for step in range(10) for row in stream(counted, step, 24, 1, 1)])
    for replicas, microbatch in ((1, 24), (2, 3), (3, 2), (4, 6), (6, 4), (8, 3), (12, 1), (24, 1)):
        rows = [row for step in range(10) for row in stream(counted, step, 24, microbatch, replicas)]
        assert fingerprint(rows) == expected


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=8))
def test_the_stream_is_the_same_when_the_replicas_change_on_the_way(replicas: list[int]) -> None:
    tokens = np.arange(31 * LENGTH + 1)
    parts = {name: Split("", len(tokens), 1, "") for name in data.SPLITS}
    dataset = Dataset(Path(), "uint16", 1000, 0, parts, "", dict.fromkeys(data.SPLITS, tokens))
    rows = [row for step, count in enumerate(replicas) for row in stream(dataset, step, 12, 1, count)]
    assert fingerprint(rows) == fingerprint(
        [row for step in range(len(replicas)) for row in stream(dataset, step, 12, 1, 1)]
    )


def test_every_epoch_has_every_token_once_also_where_it_ends_inside_a_batch(counted: Dataset) -> None:
    windows = counted.windows("train", LENGTH)
    assert windows == 23
    rows = [row for step in range(23) for row in stream(counted, step, 10, 5, 2)]  # 230 sequences = ten epochs
    epochs = [rows[e * windows : (e + 1) * windows] for e in range(10)]
    for epoch in epochs:
        seen = sorted(token for row in epoch for token in row[:LENGTH])
        assert seen == list(range(23 * LENGTH))
    assert len({tuple(row[0] for row in epoch) for epoch in epochs}) == 10


def test_the_order_of_many_windows_is_the_order_of_each() -> None:
    """Blocks and epochs are borders of the computation only: any stretch is the permutation, epoch after epoch."""
    size, length, seed = 2 * data.BLOCK + 77, 3, 9
    splits = dict.fromkeys(data.SPLITS, Split("", size * length + 1, 1, ""))
    dataset = Dataset(Path(), "uint16", 9, 0, splits, "", {})
    expected = np.concatenate([permute(np.arange(size), size, seed, epoch) for epoch in range(4)])
    for first, count in ((0, 4 * size), (data.BLOCK - 3, 7), (2 * size - 1, 2), (size + 5, 2 * size)):
        assert np.array_equal(dataset.order("train", first, count, length, seed), expected[first : first + count])
    in_order = np.arange(4 * size) % size
    assert np.array_equal(dataset.order("val", size - 9, 3 * size, length, seed), in_order[size - 9 : 4 * size - 9])


def test_a_target_is_the_next_token_also_at_the_very_end(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path / "set", range(LENGTH + 1), range(LENGTH + 1)))
    for split in data.SPLITS:
        ids, targets = dataset.batch(split, 0, 0, 0, batch=1, microbatch=1, replicas=1, length=LENGTH, seed=0)
        assert ids.tolist() == list(range(LENGTH)) and targets.tolist() == list(range(1, LENGTH + 1))


def test_validation_windows_come_in_order_and_start_over(counted: Dataset) -> None:
    firsts = []
    for micro in range(2):
        ids, _ = counted.batch("val", 0, micro, 0, batch=4, microbatch=2, replicas=1, length=LENGTH, seed=micro)
        firsts += ids.reshape(-1, LENGTH)[:, 0].tolist()
    assert firsts == [500, 507, 500, 507]


def test_a_batch_goes_where_it_is_told(counted: Dataset) -> None:
    out = np.zeros(2 * LENGTH, np.int32), np.zeros(2 * LENGTH, np.int32)
    kind = {"batch": 4, "microbatch": 2, "replicas": 2, "length": LENGTH, "seed": 1}
    made = counted.batch("train", 5, 0, 1, **kind)
    assert counted.batch("train", 5, 0, 1, **kind, out=out)[0] is out[0]
    assert np.array_equal(made[0], out[0]) and np.array_equal(made[1], out[1]) and out[1].any()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4))
def test_sequence_numbers_leave_no_gap(microbatch: int, micros: int, replicas: int, step: int) -> None:
    batch = microbatch * micros * replicas
    numbers = [
        sequence(step, replica, micro, row, batch=batch, microbatch=microbatch, replicas=replicas)
        for replica in range(replicas)
        for micro in range(micros)
        for row in range(microbatch)
    ]
    assert numbers == list(range(step * batch, (step + 1) * batch))


def test_wide_ids_survive(tmp_path: Path) -> None:
    tokens = [70000 + i for i in range(20)]
    dataset = Dataset.open(write(tmp_path / "set", tokens, tokens, vocab=128256, dtype="uint32"))
    ids, targets = dataset.batch("val", 0, 0, 0, batch=1, microbatch=1, replicas=1, length=19, seed=0)
    assert ids.tolist() == tokens[:-1] and targets.tolist() == tokens[1:]


# --- sentences


def refused(folder: str | Path, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Dataset.open(folder)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused("", "no dataset is named; set data.path to a folder made by `hpcpipe prepare`")
    refused(tmp_path / "none", "none does not exist; set data.path")
    refused(tmp_path / "file", "file is a file; set data.path")
    refused(tmp_path, "has no dataset.json; make the folder with `hpcpipe prepare`")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("[]", "is incomplete"),
        ("{}", "is incomplete (KeyError('format'))"),
        ('{"format": 9}', "has format 9, this program reads 1"),
        ('{"format": 1, "splits": {"train": {"file": "x", "tokens": "many"}}}', "is incomplete"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / data.MANIFEST).write_text(text)
    refused(tmp_path, sentence)


def test_a_manifest_that_contradicts_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", range(50), range(50))
    for values, sentence in (
        ({"vocab": 65537}, "has a vocabulary of 65537, uint16 holds 1 to 65536"),
        ({"vocab": 0}, "has a vocabulary of 0, uint16 holds 1 to 65536"),
        ({"vocab": 1000, "separator": 1000}, "has separator 1000, outside its vocabulary of 1000"),
        ({"separator": 0, "dtype": "float16"}, "has dtype float16, expected uint16 or uint32"),
    ):
        change(folder, **values)
        refused(folder, sentence)
    change(folder, dtype="uint16")
    path = folder / data.MANIFEST
    path.write_text(path.read_text().replace('"vocab": 1000', '"vocab": 999'))
    refused(folder, "was changed after it was written")


def test_a_token_file_of_the_wrong_size(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", range(50), range(50))
    whole = (folder / "train.bin").read_bytes()
    for content, sentence in (
        (whole[:-1], "train.bin is truncated: 99 bytes, dataset.json promises 50 tokens of 2 bytes = 100"),
        (whole + b"\0\0", "train.bin is too long: 102 bytes"),
        (b"", "train.bin is empty: 0 bytes"),
    ):
        (folder / "train.bin").write_bytes(content)
        refused(folder, sentence)
    (folder / "train.bin").unlink()
    refused(folder, "train.bin is missing; run `hpcpipe prepare` again")


def test_a_dataset_with_nothing_in_it(tmp_path: Path) -> None:
    refused(write(tmp_path / "set", [], range(50)), "train.bin is empty: there is nothing to train on")
    assert Dataset.open(write(tmp_path / "set", range(50), [])).windows("train", 49) == 1


def test_ids_outside_the_vocabulary_are_found_at_the_ends_and_between(tmp_path: Path) -> None:
    for at in (0, 99_999, 50_000):
        tokens = np.zeros(100_000, np.uint16)
        tokens[at] = 1000
        if at == 50_000:
            tokens[at : at + 2000] = 1000  # a stretch between the ends; single ones are for ``verify``
        with pytest.raises(UserError, match=r"has id 1000 at token \d+, outside the vocabulary of 1000"):
            Dataset.open(write(tmp_path / "set", tokens, [1, 2]))


def test_damage_of_the_same_size_is_found_by_verify(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", range(50), range(50))
    Dataset.open(folder).verify()
    raw = bytearray((folder / "val.bin").read_bytes())
    raw[10] ^= 1
    (folder / "val.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"val.bin has checksum [0-9a-f]{8}, dataset.json promises [0-9a-f]{8}"):
        Dataset.open(folder).verify()


def test_a_run_that_asks_for_more_than_there_is(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path / "set", range(50), range(5)))
    run = Config(model=ModelConfig(vocab=1000), train=TrainConfig(length=49))
    dataset.check(run)
    with pytest.raises(UserError, match=r"train.bin has 50 tokens, one window needs 51 \(train.length \+ 1\)"):
        dataset.check(dataclasses.replace(run, train=TrainConfig(length=50)))
    with pytest.raises(UserError, match=r"val.bin has 5 tokens, one window needs 50"):
        dataset.check(dataclasses.replace(run, eval=EvalConfig(every=1)))
    with pytest.raises(UserError, match=r"has a vocabulary of 1000, model.vocab is 999; set model.vocab to 1000"):
        dataset.check(dataclasses.replace(run, model=ModelConfig(vocab=999)))


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    one = Dataset.open(write(tmp_path / "a", range(50), range(9)))
    assert one.digest == Dataset.open(write(tmp_path / "b", range(50), range(9))).digest
    assert one.digest != Dataset.open(write(tmp_path / "c", range(1, 51), range(9))).digest
    assert one.digest != Dataset.open(write(tmp_path / "d", range(9), range(50))).digest


def test_no_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"there is no tokenizer .*none.json"):
        data.open_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"bad.json is not a tokenizer"):
        data.open_tokenizer(tmp_path / "bad.json")
