"""Finding a model's rotary embedding, for methods that move keys to other positions."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.core import Rotary

# rotary kinds whose frequencies do not depend on the length of the sequence
_FIXED = {"default", "linear", "llama3", "yarn", "proportional"}


def rotary_of(model: PreTrainedModel, layer: int) -> Rotary | None:
    """The rotary embedding of a layer; None where the model has none, or one whose angles depend on the sequence length."""
    config = model.config.get_text_config(decoder=True)
    kind = (getattr(config, "layer_types", None) or ["full_attention"] * (layer + 1))[layer]
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(kind, parameters)
    if parameters.get("rope_type", "default") not in _FIXED:
        return None
    for module in model.modules():
        for name in (f"{kind}_inv_freq", "inv_freq"):
            inv_freq = getattr(module, name, None)
            if isinstance(inv_freq, Tensor) and inv_freq.ndim == 1:
                return Rotary(inv_freq.detach().to(torch.float32), interleaved=bool(getattr(config, "rope_interleave", False)))
    return None
