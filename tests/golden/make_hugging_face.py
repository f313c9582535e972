"""Golden files from Hugging Face transformers: tiny models with weights, ids, logits, loss and every gradient, float32.

    python -m tests.golden.make_hugging_face      (needs torch and transformers; writes tests/golden/hugging_face/*.npz)

Tensors keep Hugging Face's names and shapes; ``ours`` turns them into ours. Weights are larger than at the start of a
training run, so that no part of a model is nearly linear and no gradient is nearly zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe import model
from hpcpipe.config import ModelConfig
from hpcpipe.hugging_face import NAMES

FOLDER = Path(__file__).parent / "hugging_face"
BATCH, LENGTH = 3, 11  # sequences, and trained tokens in each

_GPT2 = {"family": "gpt2", "layers": 2, "heads": 2, "width": 16, "context": 12, "vocab": 61}
_LLAMA = {"family": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "width": 24, "ffn": 28, "context": 12, "vocab": 61}
CASES = {
    "gpt2_tied": model.resolve(ModelConfig(**_GPT2)),
    "gpt2_untied": model.resolve(ModelConfig(**_GPT2 | {"heads": 1}, tied=False)),
    "llama_tied": model.resolve(ModelConfig(**_LLAMA, tied=True, theta=500000.0)),
    "llama_untied": model.resolve(ModelConfig(**_LLAMA | {"kv_heads": 1}, tied=False, eps=1e-6)),
    "llama_ungrouped": model.resolve(ModelConfig(**_LLAMA | {"kv_heads": 4, "layers": 1}, tied=False)),
}

def ours(theirs: Mapping[str, np.ndarray], m: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) from theirs, tied copies left out; KeyError where one is missing or left over."""
    unused, found = set(theirs), {}
    for name in model.parameters(m):
        layer = re.search(r"\d+", name)
        sources = NAMES[m.family][re.sub(r"\d+", "{}", name, count=1) if layer else name]
        parts = []
        for source in sources:
            key, _, transposed = source.format(layer[0] if layer else "").partition(" ")
            parts.append(theirs[key].T if transposed else theirs[key])
            unused.discard(key)
        found[name] = np.concatenate(parts)
    if unused:
        raise KeyError(f"no parameter of ours takes {sorted(unused)}")
    return found


def transformers_model(m: ModelConfig) -> Any:
    """Their model of our shape, in float32 with plain attention and random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    usual = {"vocab_size": m.vocab, "tie_word_embeddings": m.tied, "attn_implementation": "eager",
             "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    torch.manual_seed(len(m.family) + m.layers)
    if m.family == "gpt2":
        dropless = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        theirs = GPT2LMHeadModel(
            GPT2Config(n_positions=m.context, n_embd=m.width, n_layer=m.layers, n_head=m.heads, n_inner=m.ffn,
                       layer_norm_epsilon=m.eps, **dropless, **usual)
        )  # fmt: skip
    else:
        theirs = LlamaForCausalLM(
            LlamaConfig(hidden_size=m.width, intermediate_size=m.ffn, num_hidden_layers=m.layers,
                        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, max_position_embeddings=m.context,
                        rms_norm_eps=m.eps, rope_parameters={"rope_type": "default", "rope_theta": m.theta}, **usual)
        )  # fmt: skip
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.25)
    return theirs.float().eval()


def run(theirs: Any, sequences: np.ndarray) -> dict[str, np.ndarray]:
    """Logits [batch, length, vocab] of all tokens but the last, mean loss, gradients, from ids [batch, length + 1]."""
    import torch

    ids = torch.from_numpy(sequences)
    theirs.zero_grad()
    out = theirs(input_ids=ids, labels=ids)
    out.loss.backward()
    found = {"logits": out.logits[:, :-1], "loss": out.loss}
    found |= {f"weight/{name}": value for name, value in theirs.named_parameters()}
    found |= {f"gradient/{name}": value.grad for name, value in theirs.named_parameters()}
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def main() -> None:
    """Writes one file per case."""
    FOLDER.mkdir(exist_ok=True)
    for name, m in CASES.items():
        sequences = np.random.default_rng(len(name)).integers(0, m.vocab, (BATCH, LENGTH + 1))
        arrays = run(transformers_model(m), sequences)
        np.savez_compressed(FOLDER / f"{name}.npz", config=json.dumps(asdict(m)), sequences=sequences, **arrays)


if __name__ == "__main__":
    main()
