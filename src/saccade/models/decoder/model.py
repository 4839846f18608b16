"""The hybrid decoder as a transformers model: save, load, generate, train."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from saccade.autoclasses import register
from saccade.cache.state_layer import RECORDED, StateLayer
from saccade.core import MixerState
from saccade.methods.stack import Stack
from saccade.models.decoder.config import SaccadeConfig
from saccade.models.weights import draw


class SaccadePreTrainedModel(PreTrainedModel):
    config_class = SaccadeConfig
    config: SaccadeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own form)

    def _init_weights(self, module: nn.Module) -> None:
        draw(module, self.config.initializer_range, [module.meta] if isinstance(module, SaccadeModel) else ())


class SaccadeModel(SaccadePreTrainedModel):
    """Token table, meta tokens, stack of blocks, last norm. ValueError where the layers of the config can't be built as a decoder."""

    def __init__(self, config: SaccadeConfig) -> None:
        super().__init__(config)
        assert config.num_key_value_heads is not None and config.head_dim is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = Stack(
            config.specs, dim=config.hidden_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim, width=config.intermediate_size, max_length=config.max_position_embeddings + config.meta_tokens,
            loops=config.loops, eps=config.rms_norm_eps,
        )  # fmt: skip
        for index, spec in enumerate(config.specs):
            if self.stack.blocks[index].mixer.causality == "bidirectional":  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(f"layer {index} is {spec}, which reads tokens to come and can't decode: use a causal mixer")
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.meta = nn.Parameter(torch.empty(config.meta_tokens, config.hidden_size)) if config.meta_tokens else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states `(B, N, C)` of input_ids `(B, N)` or inputs_embeds `(B, N, C)`.

        attention_mask: `(B, seen + N)`, 0 at padding, of which the last N columns count (those before are in the cache).
        position_ids: `(B or 1, N)`, default: the number of real tokens before each. past_key_values: a cache of this model, filled in
        place; an empty DynamicCache becomes one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        assert x is not None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.stack.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        layers = None if past_key_values is None else self._layers(past_key_values)
        valid = _real(attention_mask, x)
        every: list[Tensor] | None = [] if output_hidden_states else None
        if layers is not None and x.shape[1] > 1 and any(layer.steps for layer in layers):
            # every state on the way may be asked for again
            outs, n = [], x.shape[1]
            bulk = max(0, n - RECORDED)
            for begin, end in [(0, bulk)] * (bulk > 0) + [(t, t + 1) for t in range(bulk, n)]:
                here = slice(begin, end)
                outs.append(self._run(
                    x[:, here], layers, None if valid is None else valid[:, here],
                    None if position_ids is None else position_ids[:, here], every,
                ))  # fmt: skip
            x = torch.cat(outs, dim=1)
        else:
            x = self._run(x, layers, valid, position_ids, every)
        x = self.norm(x)
        out = BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=past_key_values if use_cache else None,
            hidden_states=None if every is None else (*every, x),
        )  # fmt: skip
        return out if return_dict is None or return_dict else out.to_tuple()

    def _run(
        self, x: Tensor, layers: list[StateLayer] | None, valid: Tensor | None, positions: Tensor | None, every: list[Tensor] | None
    ) -> Tensor:
        n = x.shape[1]
        states: list[MixerState | None] | None = None if layers is None else [layer.state for layer in layers]
        meta = 0
        if self.meta is not None and (states is None or states[0] is None):
            meta = self.meta.shape[0]
            x = torch.cat([self.meta.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
            valid = None if valid is None else nn.functional.pad(valid, (meta, 0), value=True)
        if positions is not None and self.meta is not None:
            positions = positions + self.meta.shape[0]
            if meta:
                front = torch.arange(meta, device=x.device).expand(positions.shape[0], -1)
                positions = torch.cat([front, positions], dim=1)
        x, after = self.stack(x, states, positions=positions, valid=valid, keep=layers is not None, every=every)
        for layer, state in zip(layers or (), after, strict=False):
            assert state is not None
            layer.put(state, n)
        return x[:, meta:]

    def _layers(self, cache: Cache) -> list[StateLayer]:
        """The layers of the cache, made where it is empty. ValueError for a cache of another model."""
        slots = self.stack.slots
        own = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
        if len(own) != slots and not any(getattr(layer, "is_initialized", True) for layer in cache.layers):
            recorded = any(layer.record_past for layer in own)
            cache.layers[:] = own = [StateLayer() for _ in range(slots)]
            cache.layer_class_to_replicate = None
            if recorded:
                cache.activate_past_recording()
        if len(own) != slots or len(cache.layers) != slots:
            raise ValueError(
                f"the cache has {len(cache.layers)} layers of another model, this one needs {slots} states: pass an empty DynamicCache"
            )
        return own


class SaccadeForCausalLM(SaccadePreTrainedModel, GenerationMixin):
    """A language model over `SaccadeModel`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: SaccadeConfig) -> None:
        super().__init__(config)
        self.model = SaccadeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError when the checkpoint's weights are not those of the config in use."""
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved from another configuration: its weights have other shapes; load it with its own"
            ) from error
        model, info = loaded
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if wrong:
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved from another configuration: {len(wrong)} weights differ, such as {wrong[0]}; "
                "load it with its own config"
            )
        return (model, info) if wants_info else model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `(B, N, vocab)`, those of the last `logits_to_keep` tokens where that is not 0; with labels `(B, N)` (-100: not counted)
        also the mean cross-entropy of each next token. Other arguments as in `SaccadeModel.forward`."""
        unknown = set(loss_options) - {"num_items_in_batch", "ignore_index", "shift_labels"}
        if unknown:
            raise TypeError(f"SaccadeForCausalLM.forward takes no argument {sorted(unknown)[0]!r}")
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states, True
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states)
        return result if return_dict is None or return_dict else result.to_tuple()


def _real(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Which of the tokens x are real, `(B, N)` bool, or None when all are."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: expected ({x.shape[0]}, tokens so far), 0 at padding")
    valid = mask[:, -x.shape[1] :].to(x.device) != 0
    return None if bool(valid.all()) else valid


__all__ = ["SaccadeForCausalLM", "SaccadeModel", "SaccadePreTrainedModel"]

register()
