"""A trained transformer as a hybrid decoder: chosen layers get another mixer, which takes over the projections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Mixer, MixerShape, parse_spec
from saccade.methods import build_mixer
from saccade.methods.linear.softmax import SoftmaxMixer
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM, schedule
from saccade.train.extend import PROJECTIONS


def swap(teacher: PreTrainedModel, to: str, pattern: str = "pure", seed: int = 0) -> SaccadeForCausalLM:
    """`teacher`, a Llama-like transformers model, as a hybrid decoder whose layers of `pattern` are mixers `to`, with its weights.

    The other layers are softmax attention, or what the method of `to` says stays (its `staying()`: minicpm-sala's sparse layers). Where a
    mixer has a key head for every query head, those that a group shared are repeated. It is on the teacher's device, in its dtype, in eval
    mode; what the mixers add is new, drawn by the seed. Fields `theta` and `bias` of the spec follow the teacher unless they are given.
    ValueError for models that are built otherwise, and for mixers that can't take over the projections or turn by other angles.
    """
    facts = _facts(teacher)
    config = teacher.config
    cheap = _fitted(to, facts)
    specs = schedule(pattern, config.num_hidden_layers, cheap.spec, _staying(cheap, to, facts))
    shape = SaccadeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, layers=specs,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads, head_dim=facts["head_dim"],
        max_position_embeddings=config.max_position_embeddings, rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = SaccadeForCausalLM(shape)
    base = teacher.model
    _copy(student.model.embed_tokens, base.embed_tokens)
    _copy(student.model.norm, base.norm)
    if not config.tie_word_embeddings:
        _copy(student.lm_head, teacher.lm_head)
    for index, (block, layer) in enumerate(zip(student.model.stack.blocks, base.layers, strict=True)):
        _copy(block.norm, layer.input_layernorm)
        _copy(block.feed_norm, layer.post_attention_layernorm)
        _copy(block.feed_forward, layer.mlp)
        for name in PROJECTIONS:
            own = getattr(block.mixer, name, None)
            if not isinstance(own, nn.Linear):
                raise ValueError(f"{specs[index]} has no {name} to take over from a trained layer: convert to lolcats or hedgehog")
            given = getattr(layer.self_attn, name)
            repeats = config.num_attention_heads // config.num_key_value_heads
            if name not in ("k_proj", "v_proj") or own.out_features != repeats * given.out_features:
                repeats = 1
            _copy(own, given, f"{specs[index]}: {name}", repeats, facts["head_dim"])
        if hasattr(block.mixer, "take_over"):
            block.mixer.take_over()  # pyright: ignore[reportCallIssue]
    some = next(teacher.parameters())
    return student.to(device=some.device, dtype=some.dtype).eval()


def new_parameters(student: SaccadeForCausalLM) -> dict[str, nn.Parameter]:
    """What the mixers added to the trained model, by name."""
    return {name: p for name, p in _of_mixers(student) if not taken_over(name)}


def taught_parameters(student: SaccadeForCausalLM) -> dict[str, nn.Parameter]:
    """What the attention transfer trains: what is new, and all of the mixers that are taught whole."""
    blocks = student.model.stack.blocks
    return {
        name: p for name, p in _of_mixers(student)
        if teaches(mixer := blocks[int(name.split(".")[3])].mixer) and (not taken_over(name) or learns_whole(mixer))
    }  # fmt: skip


def teaches(mixer: nn.Module | Tensor) -> bool:
    """Whether a layer gives something else than the layer it replaces, and can be taught."""
    return type(mixer) is not SoftmaxMixer and getattr(mixer, "taught", True)


def learns_whole(mixer: nn.Module | Tensor) -> bool:
    """Whether all of a layer learns, by what it gives after its last projection, and not only what is new in it."""
    return getattr(mixer, "taught_whole", False)


def taken_over(name: str) -> bool:
    """Whether the parameter of a mixer with this name came from the trained model."""
    return any(part in PROJECTIONS for part in name.split("."))


def _of_mixers(student: SaccadeForCausalLM) -> Iterable[tuple[str, nn.Parameter]]:
    for index, block in enumerate(student.model.stack.blocks):
        for name, parameter in block.mixer.named_parameters():  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            yield f"model.stack.blocks.{index}.mixer.{name}", parameter


def _facts(teacher: PreTrainedModel) -> dict[str, Any]:
    """theta, bias and head_dim of a Llama-like model; ValueError where something in it is built otherwise."""
    config, name = teacher.config, type(teacher).__name__
    if config.model_type not in ("llama", "mistral", "qwen2"):
        raise ValueError(f"{name} can't be converted: give a model of the kind llama, mistral or qwen2")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    odd = {
        "a scaled rotary embedding": rope.get("rope_type", "default") != "default" or "rope_theta" not in rope,
        "an activation other than silu": config.hidden_act != "silu",
        "biases in its feed-forward layers": getattr(config, "mlp_bias", False),
        "a sliding window": bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True),
        "a bias in its output projection": getattr(teacher.model.layers[0].self_attn.o_proj, "bias", None) is not None,
    }
    if found := [what for what, there in odd.items() if there]:
        raise ValueError(f"{name} has {found[0]}, which a converted layer can't have: give another model")
    attention = teacher.model.layers[0].self_attn
    return {"theta": float(rope["rope_theta"]), "bias": attention.q_proj.bias is not None, "head_dim": int(attention.head_dim)}


def _fitted(to: str, facts: Mapping[str, Any]) -> Mixer:
    """The mixer with the model's theta and bias where it has such fields and the spec does not give them."""
    mixer = build_mixer(to)
    known, given = {field.name for field in fields(mixer)}, _given(to)
    mixer = replace(mixer, **{name: facts[name] for name in ("theta", "bias") if name in known and name not in given})
    probe = mixer.module(MixerShape(dim=4 * facts["head_dim"], heads=4, head_dim=facts["head_dim"]))
    theta = getattr(getattr(probe, "rotary", None), "theta", facts["theta"])
    if theta != facts["theta"]:
        raise ValueError(
            f"{mixer.spec} turns by angles of base {theta:g} and the model by {facts['theta']:g}: convert to lolcats, or give its theta"
        )
    return mixer


def _staying(mixer: Mixer, to: str, facts: Mapping[str, Any]) -> str:
    """The spec of the layers that are not converted; fields given in the spec hold for them too."""
    if not hasattr(mixer, "staying"):
        return build_mixer(f"softmax(theta={facts['theta']!r}, bias={facts['bias']})").spec
    stays = mixer.staying()  # pyright: ignore[reportAttributeAccessIssue]
    return replace(stays, **{name: value for name, value in _given(to).items() if name != "sparse"}).spec


def _given(to: str) -> dict[str, Any]:
    return {} if "&" in to else parse_spec(to)[1]


@torch.no_grad()
def _copy(target: Any, source: Any, what: str = "the model", repeats: int = 1, head_dim: int = 1) -> None:
    """Copy all parameters; with repeats > 1 every head of `head_dim` rows so many times, one after the other."""
    own = dict(target.named_parameters())
    given = {
        name: value if repeats == 1 else value.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)
        for name, value in source.named_parameters()
    }
    if own.keys() != given.keys() or any(own[name].shape != value.shape for name, value in given.items()):
        shapes = [{name: tuple(x.shape) for name, x in one.items()} for one in (given, own)]
        raise ValueError(f"{what} can't take over weights {shapes[0]}, its own are {shapes[1]}: choose another mixer or other fields")
    for name, value in given.items():
        own[name].copy_(value)
