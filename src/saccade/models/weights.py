"""How the models that are stacks of mixers begin."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def draw(module: nn.Module, std: float, own: Iterable[Tensor | None] = ()) -> None:
    """Normal weights of deviation `std` for linear maps and tables, zero biases, and normal numbers for the vectors in `own`.

    What a mixer sets up itself is left alone (`keeps_init` on a module).
    """
    if getattr(module, "keeps_init", False):
        return
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for vector in own:
        if vector is not None:
            nn.init.normal_(vector, std=std)
