"""The shape of a hybrid decoder."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SaccadeConfig(PreTrainedConfig):
    """layers: mixer specs, one a layer, or a list that is repeated until `num_hidden_layers` are reached, which its length then divides:
    `["kimi-linear"] * 3 + ["softmax"]`. num_hidden_layers: default, as many as listed. A spec may name a window
    (`"softmax(window=512)"`), mixers side by side (`"softmax(window=512) & deltanet"`), another layer's keys (`"softmax(kv_from=3)"`).
    hidden_size: channels of a token. intermediate_size: of the feed-forward layers, 0 for none. num_attention_heads, num_key_value_heads,
    head_dim: of every mixer. max_position_embeddings: longest sequence of mixers whose parameters have one row per position; no limit for
    others. meta_tokens: learned vectors in front of every sequence (hymba). loops: how often the stack runs (lt2).
    tie_word_embeddings: whether the last projection is the token table.
    """

    model_type = "saccade"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 320
    hidden_size: int = 384
    intermediate_size: int = 1024
    layers: list[str] | tuple[str, ...] = ("softmax",)
    num_hidden_layers: int | None = None
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    meta_tokens: int = 0
    loops: int = 1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        self.layers = [str(getattr(layer, "spec", layer)) for layer in self.layers]
        if not self.layers:
            raise ValueError("layers is empty: name at least one mixer, such as ['softmax']")
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.layers)
        listed = len(self.layers)
        if self.num_hidden_layers < 1 or self.num_hidden_layers % listed:
            raise ValueError(
                f"layers names {listed} mixers and num_hidden_layers is {self.num_hidden_layers}: "
                "list one for each layer, or a number that divides it"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if min(self.num_attention_heads, self.num_key_value_heads) < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} can't share num_key_value_heads={self.num_key_value_heads} equally: "
                "make the first a multiple of the second"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} can't be split among num_attention_heads={self.num_attention_heads}: make it a "
                    "multiple, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.meta_tokens < 0 or self.loops < 1 or self.intermediate_size < 0:
            raise ValueError(
                f"meta_tokens={self.meta_tokens}, loops={self.loops}, intermediate_size={self.intermediate_size}: give at least 0, 1 and 0"
            )
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """The types name the cache's layers and are not given by users."""

    @property
    def layer_types(self) -> list[str]:
        """What a layer of the cache is: `saccade.cache.state_layer.StateLayer`, for all."""
        return ["saccade_state"] * (self.num_hidden_layers or 1)

    @property
    def specs(self) -> list[str]:
        """One mixer spec for every layer."""
        assert self.num_hidden_layers is not None
        return list(self.layers) * (self.num_hidden_layers // len(self.layers))


__all__ = ["SaccadeConfig"]
