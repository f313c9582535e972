"""Folders of Hugging Face: what goes out comes back byte for byte, and a wrong folder is a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from hpcpipe import hugging_face, model
from hpcpipe.checkpoint import write
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import Config, ModelConfig, UserError, loads, to_toml
from hpcpipe.data import TOKENIZER
from hpcpipe.hugging_face import CONFIG, INDEX, export, import_
from small_run import run, write_tokens
from tests.golden import make_hugging_face as golden
from tests.runtime.test_hugging_face import load

SHARD = "model.safetensors"


def saved(out: Path, m: ModelConfig, weights: dict[str, np.ndarray]) -> Path:
    """A checkpoint of these weights."""
    folder = write.step_folder(out, 3)
    pieces = [
        write.Piece(name, kind, value.shape, (0,) * value.ndim, value.astype(np.float32))
        for name, value in weights.items()
        for kind in ("parameter", "moment1", "moment2")
    ]
    text = to_toml(Config(out=str(out), model=m))
    write.commit(folder, [write.write_shard(folder, 0, pieces)], {"config": text, "step": 3, "loss": 1.0})
    return out


def theirs(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder: type, shape, bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                found[name] = entry["dtype"], tuple(entry["shape"]), raw[8 + size + first : 8 + size + end]
    return found


@pytest.fixture(params=golden.CASES)
def case(request: pytest.FixtureRequest) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    m, arrays = load(request.param)
    return m, {k.removeprefix("weight/"): v for k, v in arrays.items() if k.startswith("weight/")}


def test_an_export_is_their_weights_byte_for_byte(case: Any, tmp_path: Path) -> None:
    m, weights = case
    export(str(saved(tmp_path / "run", m, golden.ours(weights, m))), str(tmp_path / "out"))
    found = theirs(tmp_path / "out")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name] == ("F32", value.shape, np.ascontiguousarray(value).tobytes())
    with safe_open(tmp_path / "out" / SHARD, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {(tmp_path / "out" / name).stat().st_mode for name in (SHARD, CONFIG)}
    assert len(modes) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_and_export_give_the_same_bytes(case: Any, tmp_path: Path, dtype: str) -> None:
    m, weights = case
    export(str(saved(tmp_path / "run", m, golden.ours(weights, m))), str(tmp_path / "first"), dtype)
    assert import_(str(tmp_path / "first"), str(tmp_path / "again")) == m
    export(str(tmp_path / "again"), str(tmp_path / "second"))
    assert theirs(tmp_path / "first") == theirs(tmp_path / "second")
    one, two = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("first", "second"))
    assert one == two and one["torch_dtype"] == dtype


def test_large_models_lie_in_several_files(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, weights = case
    monkeypatch.setattr(hugging_face, "FILE_BYTES", 4000)
    export(str(saved(tmp_path / "run", m, golden.ours(weights, m))), str(tmp_path / "out"))
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in theirs(tmp_path / "out").values())
    import_(str(tmp_path / "out"), str(tmp_path / "again"))
    expected = golden.ours(weights, m)
    again = Checkpoint.open(tmp_path / "again")
    assert again.step == 0 and again.verify() == []
    for name, value in expected.items():
        assert (again.read("parameter", name) == value).all() and not again.read("moment2", name).any()


def test_a_run_goes_on_from_an_import(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "data")
    first = run(data, tmp_path / "run", 2, "llama", train__steps=3)
    (tmp_path / "run" / TOKENIZER).write_text("{}")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert (tmp_path / "out" / TOKENIZER).read_text() == "{}"
    m = import_(str(tmp_path / "out"), str(tmp_path / "tuned"))
    assert loads(hugging_face.toml(m)).model == m
    tuned = run(data, tmp_path / "tuned", 2, "llama", train__steps=4)
    assert len(tuned.losses) == 4 and tuned.losses[0] < first.losses[-1]  # a new run would begin at first.losses[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "qwen2"}, "is of a qwen2; gpt2, llama and mistral can be read"),
        ({"rope_scaling": {"factor": 8}}, r"has rope_scaling = .*, which this program does not compute"),
        ({"num_hidden_layers": None}, "does not say num_hidden_layers"),
        ({"num_hidden_layers": 1}, r"\d+ tensors are no part of this model, model.layers.1.* for one"),
        ({"num_hidden_layers": "two"}, "has a size that is none"),
        ({"num_hidden_layers": 3}, "is in none of the safetensors files"),
        ({"intermediate_size": 29}, r"is \[28, 24\], config.json says \[29, 24\]"),
    ],
)
def test_another_model_is_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    m, arrays = load("llama_tied")
    weights = {k.removeprefix("weight/"): v for k, v in arrays.items() if k.startswith("weight/")}
    export(str(saved(tmp_path / "run", m, golden.ours(weights, m))), str(tmp_path / "out"))
    file = tmp_path / "out" / CONFIG
    config = {k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        import_(str(tmp_path / "out"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json cannot be read .*; give a model's folder"):
        import_(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        import_(str(tmp_path), str(tmp_path / "out"))
    m = golden.CASES["gpt2_tied"]
    (tmp_path / CONFIG).write_text(json.dumps(hugging_face._their_config(m, "float32")))
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        import_(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / SHARD).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is damaged"):
        import_(str(tmp_path), str(tmp_path / "out"))
    safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, tmp_path / SHARD)
    with pytest.raises(UserError, match=r"transformer.wte.weight is in none"):
        import_(str(tmp_path), str(tmp_path / "out"))


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    m, arrays = load("llama_tied")
    weights = {k.removeprefix("weight/"): v for k, v in arrays.items() if k.startswith("weight/")}
    source = str(saved(tmp_path / "run", m, golden.ours(weights, m)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        export(source, str(tmp_path / "out"))
    export(source, str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        import_(str(tmp_path / "other"), str(tmp_path / "out"))


@pytest.mark.peers
@pytest.mark.parametrize("name", golden.CASES)
def test_transformers_loads_an_export_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    m, arrays = load(name)
    weights = {k.removeprefix("weight/"): v for k, v in arrays.items() if k.startswith("weight/")}
    export(str(saved(tmp_path / "run", m, golden.ours(weights, m))), str(tmp_path / "out"))
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    ids = torch.from_numpy(arrays["sequences"])[:, :-1]
    logits = loaded.eval()(input_ids=ids).logits.detach().numpy()
    assert np.abs(logits - arrays["logits"]).max() < 1e-5 * np.abs(arrays["logits"]).max()
    assert model.parameter_count(m) == sum(p.numel() for p in loaded.parameters())
