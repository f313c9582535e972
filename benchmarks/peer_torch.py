"""The PyTorch competitor: the GPT-2 or Llama module one writes today, eager or compiled, on all cores or a GPU.

Settings in its favour: scaled_dot_product_attention, fused AdamW, multi-tensor clipping, denormals flushed, no Python
between the module and the optimizer beyond the five lines of a training step. On a GPU: autocast to bfloat16 over
float32 parameters, flash attention and nothing else.
Variants, joined by "-": ``eager`` or ``compile`` or ``autotune`` (torch.compile's max-autotune), then ``foreach`` or
``fused`` for AdamW.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.shape import OPTIMIZER, THETA, Job, Shape
from benchmarks.worker import More, Run, serve


def rotary(shape: Shape) -> torch.Tensor:
    """Cosines and sines [2, length, d / 2] of the rotary angles."""
    d = shape.width // shape.heads
    angles = torch.outer(torch.arange(shape.length), THETA ** (torch.arange(0, d, 2, dtype=torch.float64) / -d))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + d/2) of [b, heads, t, d]."""
    a, b = x.chunk(2, dim=-1)
    cosine, sine = turn
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)


class LlamaBlock(nn.Module):
    """Llama's block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c, self.sizes = shape.width, (shape.heads, shape.kv_heads, shape.kv_heads)
        self.norm1, self.norm2 = nn.RMSNorm(c, eps=1e-5), nn.RMSNorm(c, eps=1e-5)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(c, shape.qkv, bias=False), "out": nn.Linear(c, c, bias=False)})
        self.mlp = nn.ModuleDict(
            {"gate_up": nn.Linear(c, 2 * shape.ffn, bias=False), "down": nn.Linear(shape.ffn, c, bias=False)}
        )
        self.register_buffer("turn", rotary(shape), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        heads = self.attention["qkv"](self.norm1(x)).view(b, t, sum(self.sizes), -1).transpose(1, 2)
        q, k, v = heads.split(self.sizes, dim=1)
        y = F.scaled_dot_product_attention(
            rotate(q, self.turn), rotate(k, self.turn), v, is_causal=True, enable_gqa=True
        )
        x = x + self.attention["out"](y.transpose(1, 2).reshape(b, t, c))
        gate, up = self.mlp["gate_up"](self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp["down"](F.silu(gate) * up)


class Llama(nn.Module):
    """Llama with a head of its own; parameter names are those of the job."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layer = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.norm = nn.RMSNorm(shape.width, eps=1e-5)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.layer:
            x = block(x)
        logits = self.head(self.head.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(c, 3 * c), "out": nn.Linear(c, c)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(c, 4 * c), "down": nn.Linear(4 * c, c)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        qkv = self.attention["qkv"](self.norm1(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention["out"](y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with tied embeddings; parameter names are those of the job."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        c = shape.width
        self.embed = nn.Embedding(shape.vocabulary, c)
        self.embed.position = nn.Parameter(torch.empty(shape.length, c))
        self.layer = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(c)})

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.embed.position
        for block in self.layer:
            x = block(x)
        logits = F.linear(self.head["norm"](x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """AdamW with the two decay groups."""
    o = OPTIMIZER
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, **{kind: True})


def place(cuda: bool) -> torch.device:
    """The device; on a GPU nothing but flash attention may do attention."""
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    torch.backends.cuda.enable_flash_sdp(True)
    for other in ("math", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)
    return torch.device("cuda")


def loss_function(model: nn.Module, mode: str) -> nn.Module:
    """The module, compiled as the variant says."""
    if mode not in ("eager", "compile", "autotune"):
        raise ValueError(f"no PyTorch variant is called {mode!r}; known are eager, compile and autotune")
    options = {"mode": "max-autotune"} if mode == "autotune" else {}
    return model if mode == "eager" else torch.compile(model, **options)


def build(job: Job, threads: int, variant: str) -> tuple[Run, str, More]:
    """The training loop of one variant."""
    torch.set_flush_denormal(True)  # before the first parallel region: OpenMP's threads inherit it
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.set_float32_matmul_precision("highest")
    mode, _, kind = variant.partition("-")
    kind, half, pieces = kind or "fused", job.device != "cpu", job.pieces
    device = place(job.device == "cuda")
    model = (Llama if job.shape.kv_heads else GPT)(job.shape)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in job.weights.items()})
    model.to(device)
    optimizer, loss_of = optimizer_of(model, kind), loss_function(model, mode)
    parameters = list(model.parameters())
    narrow = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    tokens = torch.from_numpy(job.tokens).long().to(device)
    batches = [[(p[:, :-1].contiguous(), p[:, 1:].contiguous()) for p in b.chunk(pieces)] for b in tokens]

    def run(first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            shares = []
            for piece in batches[step % len(batches)]:
                with narrow:
                    loss = loss_of(*piece)
                loss = loss / pieces if pieces > 1 else loss
                loss.backward()
                shares.append(loss.detach())
            nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(shares)
        return [sum(map(float, shares)) for shares in losses]

    def more() -> dict[str, float]:
        return {"device_bytes": float(torch.cuda.max_memory_allocated())} if device.type == "cuda" else {}

    where = f"{threads} threads" if device.type == "cpu" else f"{torch.cuda.get_device_name()}, flash attention"
    about = f"torch {torch.__version__}, {mode}, {kind} AdamW, {where}"
    return run, about + (", autocast to bfloat16" if half else ""), more


if __name__ == "__main__":
    serve(build)
