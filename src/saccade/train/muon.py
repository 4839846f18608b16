"""Muon: momentum whose update is made orthogonal, for the matrices inside a network (Jordan et al., 2024).

The same rule as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but matrices of one shape are stacked and
orthogonalised together: a small network's step is then not spent on launching hundreds of tiny kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from saccade.train.distributed import spread, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: a steep slope at 0, singular values near 1
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push the singular values of `(S, rows, columns)` matrices towards 1 with the quintic Newton-Schulz iteration.

    Works and returns in bfloat16 on a GPU and in float32 on a CPU, where products of stacked bfloat16 matrices take fifty times as long.
    """
    a, b, c = COEFFICIENTS
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, scaled so that AdamW's learning rates fit.

    Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices, but a parameter has shape {tuple(p.shape)}; use AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape[0], p.shape[1]].append(p)
            for shape, params in alike.items():
                self._update(params, shape, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _update(self, params: list[Tensor], shape: tuple[int, int], lr: float, momentum: float, decay: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        buffers: list[Tensor] = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        # of shared-out parameters the momentum stays in shards; only the whole matrix can be made orthogonal
        updates = orthogonalise(torch.stack([whole(matrix) for matrix in ahead])).to(params[0].dtype)
        scale = 0.2 * max(shape) ** 0.5  # an orthogonal matrix then has the root mean square of AdamW's update
        torch._foreach_mul_(params, 1 - lr * decay)
        parts = [spread(update, p) for update, p in zip(updates.unbind(), params, strict=True)]
        torch._foreach_add_(params, parts, alpha=-lr * scale)
