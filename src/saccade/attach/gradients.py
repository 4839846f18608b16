"""A dense forward and backward pass whose attention gradients go to a method's offline part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.capture import reading_session
from saccade.core import LayerContext
from saccade.parts.static.gradient import GradientCalibrated


def measure_gradients(
    model: PreTrainedModel, method: GradientCalibrated, batch: Tensor, add: Callable[[int, dict[str, Tensor]], None]
) -> None:
    """Give `add` each layer's number and what `method` measures there on token ids `(B, N)`: the next-token loss on the last tokens
    goes back to each layer's attention.

    No parameter's gradient is touched, and frozen parameters do not matter.
    """
    calls: list[tuple[LayerContext, Tensor, Tensor, Tensor]] = []
    outs: list[Tensor] = []

    def keep(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        calls.append((ctx, q.detach(), k.detach(), v.detach()))
        outs.append(out)

    answer = min(max(1, method.loss_tokens(batch.shape[1])), batch.shape[1] - 1)
    with torch.enable_grad(), reading_session(model, keep):
        embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, -answer - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -answer:].flatten())
        gradients = torch.autograd.grad(loss, outs)
    for (ctx, q, k, v), d_out in zip(calls, gradients, strict=True):
        add(ctx.layer, method.measure_gradient(ctx, q, k, v, d_out))
