"""The shape of a vision transformer."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SaccadeViTConfig(PreTrainedConfig):
    """layers: mixer specs, one a layer, or a list that is repeated until `num_hidden_layers` are reached; see
    `saccade.models.vit.image_mixer` for what is taken. image_size, patch_size: pixels, one number or (height, width); patches fill the
    image. num_channels: of a pixel. hidden_size: channels of a token. intermediate_size: of the feed-forward layers, 0 for none.
    num_attention_heads, head_dim: of every mixer. pool: the image's vector is the "mean" of its tokens, or a "token" of its own in front
    of them. positions: add a learned vector for every place. The number of classes is `num_labels`.
    """

    model_type = "saccade_vit"

    image_size: int | list[int] | tuple[int, ...] = 32
    patch_size: int | list[int] | tuple[int, ...] = 4
    num_channels: int = 3
    hidden_size: int = 192
    intermediate_size: int = 384
    layers: list[str] | tuple[str, ...] = ("softmax",)
    num_hidden_layers: int | None = None
    num_attention_heads: int = 3
    head_dim: int | None = None
    pool: str = "mean"
    positions: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.layers = [str(getattr(layer, "spec", layer)) for layer in self.layers]
        if not self.layers:
            raise ValueError("layers is empty: name at least one mixer, such as ['mala']")
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.layers)
        if self.num_hidden_layers < 1 or self.num_hidden_layers % len(self.layers):
            raise ValueError(
                f"layers names {len(self.layers)} mixers and num_hidden_layers is {self.num_hidden_layers}: "
                "list one for each layer, or a number that divides it"
            )
        self.image_size, self.patch_size = _sides(self.image_size, "image_size"), _sides(self.patch_size, "patch_size")
        if any(whole % part for whole, part in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"patches of {self.patch_size} pixels don't fill an image of {self.image_size}: choose sides that divide it")
        if self.num_attention_heads < 1 or self.num_channels < 1 or self.intermediate_size < 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}, num_channels={self.num_channels}, "
                f"intermediate_size={self.intermediate_size}: give at least 1, 1 and 0"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} can't be split among num_attention_heads={self.num_attention_heads}: make it a "
                    "multiple, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.pool not in ("mean", "token"):
            raise ValueError(f"pool={self.pool!r} is not 'mean' or 'token'")
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """There is no cache whose layers could have types."""

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the image in patches."""
        (h, w), (p, q) = _sides(self.image_size, "image_size"), _sides(self.patch_size, "patch_size")
        return h // p, w // q

    @property
    def specs(self) -> list[str]:
        """One mixer spec for every layer."""
        assert self.num_hidden_layers is not None
        return list(self.layers) * (self.num_hidden_layers // len(self.layers))


def _sides(size: int | list[int] | tuple[int, ...], name: str) -> list[int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name}={size}: give one positive number of pixels, or (height, width)")
    return sides


__all__ = ["SaccadeViTConfig"]
