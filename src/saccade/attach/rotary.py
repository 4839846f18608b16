"""Finding a model's rotary embedding, for methods that move keys to other positions.

Settings do not tell how a model pairs its channels, which layers carry no position at all, or where the turned channels
lie. So each attention layer is asked once: it stores one token at two positions, and the two keys show what the
embedding does.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Rotary
from saccade.parts.rotary import turn

# rotary kinds whose frequencies do not depend on the length of the sequence
_FIXED = {"default", "linear", "llama3", "yarn", "proportional"}
_PLACES = (3, 40)  # the two positions: far enough apart that pairing channels wrongly shows
_AGREES = 0.1  # of the distance between the two keys; bfloat16 rounding gives about 0.01, wrong pairs 1

Pairing = Literal["halves", "neighbours", "none"]


class _Found(NamedTuple):
    """A layer's rotary module, the name of its frequencies there, and what the layer does with them."""

    embedding: nn.Module
    name: str
    pairing: Pairing


_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[int, _Found | None]] = weakref.WeakKeyDictionary()


def rotary_of(model: PreTrainedModel, layer: int) -> Rotary | None:
    """The rotary embedding of a layer; with no pairs where this layer carries no position and others of the model do.

    None where the model has none, where its angles depend on the sequence length, or where keys are not made of turned
    channels first and unturned ones after them (latents, tables of sines).
    """
    layers = _FOUND.setdefault(model, {})
    if layer not in layers:
        layers[layer] = _look(model, layer)
    found = layers[layer]
    if found is None:
        return None
    # read anew each time: the model may have moved to another device
    frequencies = getattr(found.embedding, found.name).detach().to(torch.float32)
    turned = frequencies[:0] if found.pairing == "none" else frequencies
    return Rotary(turned, interleaved=found.pairing == "neighbours")


def _look(model: PreTrainedModel, layer: int) -> _Found | None:
    config = model.config.get_text_config(decoder=True)
    kind = (getattr(config, "layer_types", None) or ["full_attention"] * (layer + 1))[layer]
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(kind, parameters) or {}
    if parameters.get("rope_type", "default") not in _FIXED or getattr(config, "kv_lora_rank", None):
        return None
    found = _embedding(model, kind)
    attention = None if found is None else _attention_module(model, layer)
    if found is None or attention is None:
        return None
    pairing = _ask(attention, *found, kind, model)
    return None if pairing is None else _Found(*found, pairing)


def _embedding(model: PreTrainedModel, kind: str) -> tuple[nn.Module, str] | None:
    """The language model's rotary module and the name of its frequencies for a kind of layer."""
    decoder = model.get_decoder()
    for module in (decoder if isinstance(decoder, nn.Module) else model).modules():
        for name in (f"{kind}_inv_freq", "inv_freq"):
            inv_freq = getattr(module, name, None)
            if isinstance(inv_freq, Tensor) and inv_freq.ndim == 1:
                return module, name
    return None


def _attention_module(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The innermost module of a layer that takes rotary angles and a cache."""
    decoder = model.get_decoder()
    found = None
    for module in (decoder if isinstance(decoder, nn.Module) else model).modules():
        if getattr(module, "layer_idx", None) == layer and _cache_name(module) is not None:
            found = module  # parents come before their children
    return found


def _cache_name(module: nn.Module) -> str | None:
    takes = inspect.signature(module.forward).parameters
    if "position_embeddings" not in takes:
        return None
    return next((name for name in ("past_key_values", "past_key_value", "layer_past") if name in takes), None)


def _required(module: nn.Module) -> list[str]:
    """Arguments without a default: masks, biases and the like, which do not reach the keys."""
    takes = inspect.signature(module.forward).parameters.values()
    return [p.name for p in takes if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


class _Stored(Exception):
    """Carries the keys that a layer was about to store."""

    def __init__(self, keys: Any) -> None:
        super().__init__("the layer has made its keys")
        self.keys = keys


class _Asking:
    """Stands in for a cache and ends the layer's run at the moment it stores its keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise _Stored(key_states)

    def get_seq_length(self, *_: Any) -> int:
        return 0


@torch.no_grad()
def _ask(attention: nn.Module, embedding: nn.Module, name: str, kind: str, model: PreTrainedModel) -> Pairing | None:
    """How a layer turns keys; None when it can't be asked or does something else."""
    keys = _keys(attention, embedding, kind, model)
    if keys is None:
        return None
    first, second = keys[:, :, :1].float(), keys[:, :, 1:].float()
    moved = float((second - first).norm())
    if moved <= 1e-3 * float(first.norm()):
        return "none"
    inv_freq = getattr(embedding, name)
    if 2 * inv_freq.numel() > keys.shape[-1]:
        return None
    for pairing in ("halves", "neighbours"):
        rotary = Rotary(inv_freq.float(), interleaved=pairing == "neighbours")
        missed = float((turn(first, _PLACES[1] - _PLACES[0], rotary) - second).norm())
        if missed <= _AGREES * moved:
            return pairing
    return None


def _keys(attention: nn.Module, embedding: nn.Module, kind: str, model: PreTrainedModel) -> Tensor | None:
    """Keys `(1, Hk, 2, D)` of one random hidden state at the two places; None when the layer takes other arguments."""
    config = model.config.get_text_config(decoder=True)
    weight = next(attention.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else model.dtype
    hidden = torch.randn(1, 1, config.hidden_size, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1)
    hidden = hidden.to(weight.device, dtype)
    places = torch.tensor([_PLACES], device=weight.device)
    named = {"layer_type": kind} if "layer_type" in inspect.signature(embedding.forward).parameters else {}
    arguments: dict[str, Any] = dict.fromkeys(_required(attention))
    try:
        angles = embedding(hidden, places, **named)
        arguments |= {"hidden_states": hidden, "position_embeddings": angles, _cache_name(attention) or "": _Asking()}
        attention(**arguments)
    except _Stored as stored:
        keys = stored.keys
        return keys if isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[2] == 2 else None
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        # a layer of another make; it may still be attached, only not have its keys moved
        return None
    return None
