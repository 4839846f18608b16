"""calibrate: the offline part of methods that have one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.capture import reading_session
from saccade.core import Calibrated, LayerContext, Method, Plan, fingerprint
from saccade.methods import build


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    method: str | Method,
    token_batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Measure `method` on token batches `(B, N)` int64 (no padding) and conclude a Plan for this model.

    progress is called with the number of batches done. ValueError when the method has no offline part or no batch was given.
    """
    chosen = build(method)
    if not isinstance(chosen, Calibrated):
        raise ValueError(f"{chosen.info.slug} has no offline part: use it without a plan")
    sums: dict[int, dict[str, Tensor]] = {}

    def measure(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        found = chosen.measure(ctx, q, k, v)
        layer = sums.setdefault(ctx.layer, {})
        for name, value in found.items():
            layer[name] = layer[name] + value if name in layer else value

    done, tokens = 0, 0
    device = next(model.parameters()).device
    with reading_session(model, measure):
        for batch in token_batches:
            if batch.ndim != 2 or batch.shape[1] < 2:
                raise ValueError(f"a calibration batch has shape {tuple(batch.shape)}: expected (B, N) token ids with N >= 2")
            model(input_ids=batch.to(device), use_cache=False)
            done, tokens = done + 1, tokens + batch.numel()
            if progress is not None:
                progress(done)
    if not done:
        raise ValueError("calibrate was given no token batches: give at least one")
    tensors = {
        f"layer.{layer}.{name}": value for layer, found in sums.items() for name, value in chosen.conclude(found).items()
    }
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return Plan(
        slug=chosen.info.slug, spec=chosen.spec, fingerprint=fingerprint(model), tensors=tensors,
        notes={"batches": done, "tokens": tokens, "model": type(model).__name__ if "/" in name else name},
    )  # fmt: skip
