"""What can be attached: which layers of a model, and why not the others."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from saccade.core import CachePolicy, Decode, Method, Prefill, PromptReduction

# settings of layer_types that keep every token and are not tied to another mechanism
_FULL = "full_attention"


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model (a part of a multimodal model's)."""
    return model.config.get_text_config(decoder=True)


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """The attention kind of each layer as transformers' cache sees it; "shared" where layers use one cache together."""
    config = text_config(model)
    layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if getattr(config, "sliding_window", None):
            kinds = ["sliding_attention"] * layers
        elif getattr(config, "attention_chunk_size", None):
            kinds = ["chunked_attention"] * layers
        else:
            kinds = [_FULL] * layers
    kinds = list(kinds)
    first_shared = layers - int(getattr(config, "num_kv_shared_layers", 0) or 0)
    # later layers read the cache of the last earlier layer of their kind: dropping its entries would change them
    owners = {max((i for i in range(first_shared) if kinds[i] == kind), default=None) for kind in set(kinds[first_shared:])}
    return ["shared" if i >= first_shared or i in owners else kind for i, kind in enumerate(kinds)]


def managed_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the full-attention layers, which an attached model takes over; the rest is left alone.

    ValueError, in one sentence, when the model can't be attached.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"attach takes a transformers model, not {type(model).__name__}")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: only decoder-only models can be attached")
    kinds = layer_kinds(model)
    managed = [index for index, kind in enumerate(kinds) if kind == _FULL]
    if not managed:
        raise ValueError(
            f"every layer of {name} is of kind {', '.join(sorted(set(kinds)))}: only full-attention layers can be attached"
        )
    if getattr(text_config(model), "index_topk", None):
        raise ValueError(f"{name} brings its own trained sparse selection, which an attached method would override")
    return managed


def caches_latents(model: PreTrainedModel) -> bool:
    """Whether the model caches one latent per token instead of heads (multi-head latent attention)."""
    return bool(getattr(text_config(model), "kv_lora_rank", None))


def check_methods(model: PreTrainedModel, methods: dict[str, Method | None]) -> None:
    """ValueError when a method sits in the wrong place or can't work on this model."""
    kinds: dict[str, tuple[type[Method], ...]] = {"prefill": (Prefill, PromptReduction), "decode": (Decode,), "cache": (CachePolicy,)}
    for place, method in methods.items():
        if method is not None and method.info.phase == "mixer":
            raise ValueError(
                f"{method.info.slug} is a layer that is trained, not a method to attach: make it with saccade.mixer({method.spec!r}, dim=, "
                "heads=), or a model of such layers with SaccadeConfig"
            )
        if method is not None and not isinstance(method, kinds[place]):
            raise ValueError(f"{method.info.slug} acts on the {method.info.phase} phase: pass it as {method.info.phase}=, not {place}=")
    policy, decode = methods.get("cache"), methods.get("decode")
    if policy is None:
        return
    latents = caches_latents(model)
    if policy.info.encodes and latents:
        raise ValueError(
            f"{policy.info.slug} encodes keys and values head by head, {type(model).__name__} caches one latent for all heads"
        )
    if decode is None or decode == policy:
        return
    if policy.info.encodes and not decode.info.reads_encoded:
        raise ValueError(
            f"{decode.info.slug} reads keys in full precision and {policy.info.slug} encodes them: use one of the two, or a method with an "
            "index of its own, such as quest"
        )
    if policy.info.ragged:
        raise ValueError(
            f"{decode.info.slug} needs heads that hold equally many entries, which {policy.info.slug} does not keep: use one of the two"
        )


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that may call the attention function (they know their layer)."""
    return [module for module in model.modules() if hasattr(module, "layer_idx")]
