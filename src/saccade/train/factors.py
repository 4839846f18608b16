"""Factors for cskv: ASVD from a model's projections, and training on the reconstruction of keys and values.

    s_i = mean |x_i| at the input of the key (value) projection W,   S = diag(s^alpha),   S W = U Sig V^T
    code c = (y - b) V_r Sig_r^-0.5,   y' = c Sig_r^0.5 V_r^T + b,       y = x W + b before the rotary embedding, b the bias or 0

    loss = sum over layers  mean (K' - K)^2 + mean (V' - V)^2            (the rotary embedding, being orthogonal, would not change it)

The model runs as it is and does not learn. Where the method holds codes in few bits, the loss sees codes that went through those bits, and
their gradient passes straight through.

Source: cskv, arXiv 2409.10593 (AdamW, rate 5e-5, no warm-up, texts of 1024 tokens; ASVD with alpha 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.attach import capture
from saccade.attach.models import attention_modules, managed_layers
from saccade.attach.rotary import rotary_of
from saccade.cache.factored import in_bits
from saccade.core import Plan, fingerprint
from saccade.methods import build
from saccade.methods.kvcomp.cskv import CSKV, RAW, unturned
from saccade.ops.decode import Packed
from saccade.parts.factors import asvd_factors, beside

NAMES = ("key", "value")


@torch.no_grad()
def asvd_plan(model: PreTrainedModel, batches: Iterable[Tensor], method: str | CSKV = "cskv", *, alpha: float = 0.5) -> Plan:
    """ASVD's factors for the densities of `method`, input sizes measured on batches of token ids `(B, N)` without padding.

    alpha: how much the sizes weigh; 0: the plain SVD of the projections. ValueError without batches, and for a model whose layers have
    no projections k_proj and v_proj of their own, or normalise what these give: `saccade.calibrate` serves such models.
    """
    chosen = _cskv(build(method))
    projections = _projections(model)
    sums = {at: torch.zeros(module.in_features, dtype=torch.float64, device=module.weight.device) for at, module in projections.items()}
    tokens, device = 0, next(model.parameters()).device

    def reading(at: tuple[int, str]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[at] += inputs[0].abs().double().flatten(0, -2).sum(0)

        return read

    hooks = [module.register_forward_pre_hook(reading(at)) for at, module in projections.items()]
    try:
        for ids in batches:
            model(input_ids=ids.to(device), use_cache=False)
            tokens += ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("asvd_plan was given no token batches: give at least one")
    tensors = {}
    heads = _kv_heads(model)
    for (layer, name), module in projections.items():
        width = module.out_features
        factors = asvd_factors(module.weight.mT, sums[layer, name] / tokens, chosen.rank(name, width // heads, heads), alpha)
        offset = torch.zeros(width) if module.bias is None else module.bias.float()
        own = {"down": factors.down, "up": factors.up, "offset": offset}
        tensors |= {f"layer.{layer}.{name}_{part}": x.cpu() for part, x in own.items()}
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    notes = {"tokens": tokens, "alpha": alpha, "model": type(model).__name__ if "/" in name else name}
    return Plan(slug=chosen.info.slug, spec=chosen.spec, fingerprint=fingerprint(model), tensors=tensors, notes=notes)


def train_factors(
    model: PreTrainedModel, batches: Iterable[Tensor], plan: Plan, *, steps: int, rate: float = 5e-5,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """Train the factors of a plan of `asvd_plan` or `saccade.calibrate` on the reconstruction loss, and return the plan with them.

    batches: token ids `(B, N)` without padding, at least `steps` of them, one a step; their order decides the result, there is no
    other randomness. rate: of AdamW. Bits and window are those of the plan's method. progress: gets {"step", "loss"} after each
    step. ValueError for another method's plan and where the batches end too soon.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train_factors got steps={steps!r}: give a whole number of at least 1")
    plan.check_model(model)
    chosen, device, supply = _cskv(build(plan.spec)), next(model.parameters()).device, iter(batches)
    heads = _kv_heads(model)
    factors = {
        (layer, name): [plan.tensor(layer, f"{name}_{part}").to(device, copy=True).requires_grad_() for part in ("down", "up")]
        for layer in managed_layers(model) for name in NAMES
    }  # fmt: skip
    optimizer = torch.optim.AdamW([x for own in factors.values() for x in own], lr=rate)
    for step in range(steps):
        ids = next(supply, None)
        if ids is None:
            raise ValueError(f"the batches ended after {step} of {steps} steps: give one a step")
        rows = _rows(model, ids.to(device))
        with torch.enable_grad():
            loss = torch.stack([_loss(chosen, layer, heads, rows, factors, plan) for layer in managed_layers(model)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress({"step": step, "loss": float(loss.detach())})
    tensors = dict(plan.tensors)
    for (layer, name), (down, up) in factors.items():
        tensors |= {f"layer.{layer}.{name}_down": down.detach().cpu(), f"layer.{layer}.{name}_up": up.detach().cpu()}
    return replace(plan, tensors=tensors, notes={**plan.notes, "trained_steps": steps, "rate": rate})


@torch.no_grad()
def _rows(model: PreTrainedModel, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """Keys before the rotary embedding and values of each layer, heads side by side, `(B, N, C)` float32."""
    with capture(model) as layers:
        model(input_ids=ids, use_cache=False)
    found = {}
    for own in layers:
        found[own.layer, "key"] = beside(unturned(own.k, rotary_of(model, own.layer))).float()
        found[own.layer, "value"] = beside(own.v).float()
    return found


def _loss(
    method: CSKV, layer: int, heads: int, rows: dict[tuple[int, str], Tensor], factors: dict[tuple[int, str], list[Tensor]], plan: Plan
) -> Tensor:
    """Mean squared error of a layer's keys plus that of its values."""
    offsets = {name: plan.tensor(layer, f"{name}_offset").to(rows[layer, name].device) for name in NAMES}
    codes = [(rows[layer, name] - offsets[name]) @ factors[layer, name][0] for name in NAMES]
    if method.bits != RAW:
        keys, values = (c.detach().unsqueeze(1) for c in codes)
        packed = in_bits(keys, values, method.bits, method.window, heads)
        codes = [straight_through(c, own) for c, own in zip(codes, packed, strict=True)]
    errors = [c @ factors[layer, name][1] + offsets[name] - rows[layer, name] for c, name in zip(codes, NAMES, strict=True)]
    return torch.stack([error.square().mean() for error in errors]).sum()


def straight_through(codes: Tensor, packed: Packed) -> Tensor:
    """What is read of codes `(B, n, r)` that were packed, with the gradient of the codes themselves: rounding stays in their range."""
    read = packed.read(0, codes.shape[1], torch.float32).squeeze(1)
    return codes + (read - codes).detach()


def _cskv(method: Any) -> CSKV:
    if not isinstance(method, CSKV):
        raise ValueError(f"{method.spec} has no factors to be made: give cskv, or a plan for it")
    return method


def _kv_heads(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _projections(model: PreTrainedModel) -> dict[tuple[int, str], nn.Linear]:
    """The key and value projections of every managed layer; ValueError where a layer has others."""
    found: dict[tuple[int, str], nn.Linear] = {}
    managed = managed_layers(model)
    for module in attention_modules(model):
        layer = getattr(module, "layer_idx", None)
        if layer not in managed:
            continue
        for name, own in (("key", "k_proj"), ("value", "v_proj")):
            projection = getattr(module, own, None)
            if isinstance(projection, nn.Linear):
                if getattr(module, f"{own[0]}_norm", None) is not None:
                    raise ValueError(f"layer {layer} normalises what {own} gives, which its weight does not show: use saccade.calibrate")
                found[layer, name] = projection
    missing = [layer for layer in managed if (layer, "key") not in found or (layer, "value") not in found]
    if missing:
        raise ValueError(f"layer {missing[0]} of {type(model).__name__} has no linear k_proj and v_proj: use saccade.calibrate")
    return found
