"""The optimizers of a recipe: AdamW, or Muon for the matrices inside the network and AdamW for what is not one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.train.muon import Muon
from saccade.train.recipe import Rule


def inner_matrices(model: PreTrainedModel) -> list[Tensor]:
    """The weights of the linear maps, except the one that gives the logits (and the embedding it may share)."""
    outer = {id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None for p in part.parameters()}
    found = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    return [p for key, p in found.items() if key not in outer]


def build_optimizers(model: PreTrainedModel, rule: Rule) -> list[torch.optim.Optimizer]:
    """One optimizer or two; every parameter that needs a gradient is in exactly one group."""
    every = [p for p in model.parameters() if p.requires_grad]
    if rule.name == "adamw":
        groups = [
            {"params": [p for p in every if p.ndim >= 2], "weight_decay": rule.weight_decay},
            {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW([group for group in groups if group["params"]], lr=rule.rate, betas=rule.betas)]
    inner = inner_matrices(model)
    if not inner:
        raise ValueError("optimizer.name is muon, but the model has no matrices inside: use adamw")
    taken = {id(p) for p in inner}
    rest = [p for p in every if id(p) not in taken]
    muon = Muon(inner, lr=rule.rate, momentum=rule.momentum, weight_decay=rule.weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=rule.rate, betas=rule.betas, weight_decay=0.0)] if rest else [muon]
