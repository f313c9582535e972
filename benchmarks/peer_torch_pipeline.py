"""torch.distributed.pipelining in the contest of pipelines: two processes, gloo on the loopback, one thread each.

The process that is asked is rank 0; it starts rank 1, which is the same worker and is told by rank 0 what to do. The
variant is a ``Layout``. Modules, optimizer and settings are those of ``peer_torch``; the gradient of the tied embedding
is added up between the two ranks where they both hold it, and the norm of the gradient is that of the whole model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from typing import IO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from benchmarks.peer_torch import GPT, Block, optimizer_of
from benchmarks.pipeline import RANKS, Layout, leading
from benchmarks.shape import OPTIMIZER, Job
from benchmarks.worker import Run, serve

SCHEDULES = {"1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B", "zb_v": "ScheduleZBVZeroBubble"}
PATIENCE = timedelta(minutes=5)  # for the other rank, which may have died


class Part(nn.Module):
    """The slots [first, last) of a model: slot 0 is the embedding, then the layers, then the head."""

    def __init__(self, model: GPT, first: int, last: int) -> None:
        super().__init__()
        blocks = list(model.layer)
        self.embed = model.embed if first == 0 else None
        self.layer = nn.ModuleList(blocks[max(first - 1, 0) : last - 1])
        is_head = last == len(blocks) + 2
        self.norm = model.head["norm"] if is_head else None
        self.out = model.embed.weight if is_head else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x) + self.embed.position
        for block in self.layer:
            assert isinstance(block, Block)
            x = block(x)
        return x if self.norm is None else F.linear(self.norm(x), self.out)


def model_of(job: Job) -> GPT:
    """The whole model with the job's weights; a rank keeps what its stages hold."""
    model = GPT(job.shape)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in job.weights.items()})
    return model


def schedule_of(parts: dict[int, Part], layout: Layout, micros: int) -> pipelining.schedules._PipelineSchedule:
    """Their schedule; the loss is divided by the microbatches here, because two stages may share the embedding."""

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1)) / micros

    stages = [PipelineStage(part, s, layout.stages, torch.device("cpu")) for s, part in parts.items()]
    kind = getattr(pipelining, SCHEDULES[layout.schedule])
    return kind(stages if layout.stages > RANKS else stages[0], micros, loss_fn=loss_of, scale_grads=False)


def build(job: Job, threads: int, variant: str) -> tuple[Run, str]:
    """The training loop of one rank; rank 0 leads."""
    rank, layout = int(os.environ.get("RANK", "0")), Layout.parse(variant)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    follower = join(rank)
    model, micros, ends = model_of(job), layout.micros(job.shape), (layout.placement[0], layout.placement[-1])
    parts = {s: Part(model, *layout.slots(s)) for s, owner in enumerate(layout.placement) if owner == rank}
    pipeline, own, embedding = schedule_of(parts, layout, micros), nn.ModuleList(parts.values()), model.embed.weight
    optimizer, parameters = optimizer_of(own, "fused"), list(own.parameters())
    is_first, is_last = (rank == end for end in ends)
    counted = [p for p in parameters if is_first or p is not embedding]  # the norm takes a tied one once
    del model
    tokens = torch.from_numpy(job.tokens).long()
    batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in tokens]

    def train(first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            ids, targets = batches[step % len(batches)]
            shares: list[torch.Tensor] = []
            pipeline.step(
                *([ids] if is_first else []), target=targets if is_last else None,
                losses=shares if is_last else None, return_outputs=False,
            )  # fmt: skip
            if ends[0] != ends[1]:
                dist.all_reduce(embedding.grad)
            norm = nn.utils.get_total_norm([p.grad for p in counted], foreach=True)
            totals = torch.stack([norm**2, torch.stack(shares).sum().detach() if is_last else torch.zeros(())])
            dist.all_reduce(totals)
            nn.utils.clip_grads_with_norm_(parameters, OPTIMIZER.clip, totals[0].sqrt(), foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(totals[1]))
        return losses

    about = f"torch {torch.__version__}, {SCHEDULES[layout.schedule]}, {layout}, {micros} microbatches, gloo"
    return leading(train, follower), about


def join(rank: int) -> IO[str] | None:
    """Makes the process group, each rank on a core of its own; rank 0 starts rank 1 and returns the stream to it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    follower = None
    port = int(os.environ.get("MASTER_PORT", "0")) if rank else 0
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0, wait_for_workers=False, timeout=PATIENCE)
    if rank == 0:
        started = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_torch_pipeline", *sys.argv[1:]], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env=os.environ | {"RANK": "1", "WORLD_SIZE": str(RANKS), "MASTER_PORT": str(store.port)},
        )  # fmt: skip
        follower = started.stdin
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=PATIENCE)
    return follower


if __name__ == "__main__":
    serve(build)
