"""One process per GPU, started by `torchrun`, or a single process: the same calls for both.

Processes either hold the whole model each and average gradients, or share it: `shard` (FSDP2) leaves every process a part of every
parameter, `whole` puts a part's tensor together, `spread` takes this process's part of a whole one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others."""

    rank: int
    world: int
    device: torch.device

    def average_gradients(self, params: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over the processes, in one exchange."""
        if self.world == 1:
            return
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])

    def agree(self, number: float) -> float:
        """The number that the first process holds."""
        if self.world == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.world == 1:
            return numbers
        shared = numbers.to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Share the parameters of `model` out to the processes, in place, layer by layer, where there are several."""
    if ranks.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    # the layers: the list that holds most of the model; lists of small parts inside a layer stay with it
    layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=nn.ModuleList())
    for layer in dict.fromkeys(layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard; every process has to call this. Anything else is returned as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[union-attr]


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor that every process holds, laid out as `like`; without shards, or for a tensor of another
    shape (a counter), the tensor itself.
    """
    if not hasattr(like, "device_mesh") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


@contextmanager
def join(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that `torchrun` started (or be alone), and leave them at the end.

    `device` is "cuda" or "cpu"; None takes the GPU if there is one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {kind!r} was asked for, expected 'cuda' (on a machine with a GPU) or 'cpu'")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(0, 1, torch.device(kind))
        return
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()
