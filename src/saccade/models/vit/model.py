"""The vision transformer as a transformers model: patches, a stack of mixers, a vector for the image, classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from saccade.autoclasses import register
from saccade.methods.stack import Stack
from saccade.models.vit.config import SaccadeViTConfig
from saccade.models.vit.mixers import image_mixer
from saccade.models.weights import draw


class SaccadeViTPreTrainedModel(PreTrainedModel):
    config_class = SaccadeViTConfig
    config: SaccadeViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own form)

    def _init_weights(self, module: nn.Module) -> None:
        draw(module, self.config.initializer_range, (module.places, module.token) if isinstance(module, SaccadeViTModel) else ())


class SaccadeViTModel(SaccadeViTPreTrainedModel):
    """Patches, places, stack of blocks, last norm, pooling. ValueError where the layers of the config can't be built for its image."""

    def __init__(self, config: SaccadeViTConfig) -> None:
        super().__init__(config)
        grid, token = config.grid, config.pool == "token"
        n = grid[0] * grid[1] + token
        made = []
        for index, spec in enumerate(config.specs):
            try:
                made.append(image_mixer(spec, grid, token))
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from None
        assert isinstance(config.patch_size, list)
        height, width = config.patch_size
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, (height, width), stride=(height, width))
        self.places = nn.Parameter(torch.empty(n, config.hidden_size)) if config.positions else None
        self.token = nn.Parameter(torch.empty(config.hidden_size)) if token else None
        self.stack = Stack(
            made, dim=config.hidden_size, heads=config.num_attention_heads, head_dim=config.head_dim or 0, width=config.intermediate_size,
            max_length=n, eps=config.rms_norm_eps,
        )  # fmt: skip
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Tokens `(B, N, C)`, row after row and behind the class token where there is one, and the image's vector `(B, C)`.

        pixel_values: `(B, channels, height, width)`, floating point. ValueError for images of another size.
        """
        config = self.config
        assert isinstance(config.image_size, list)
        expected = (config.num_channels, *config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}: expected (B, {', '.join(map(str, expected))})")
        x = self.patches(pixel_values.to(self.patches.weight.dtype)).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        if self.places is not None:
            x = x + self.places.to(x.dtype)
        every: list[Tensor] | None = [] if output_hidden_states else None
        x, _ = self.stack(x, keep=False, every=every)
        x = self.norm(x)
        out = BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=x.mean(1) if self.token is None else x[:, 0],
            hidden_states=None if every is None else (*every, x),
        )  # fmt: skip
        return out if return_dict is None or return_dict else out.to_tuple()


class SaccadeViTForImageClassification(SaccadeViTPreTrainedModel):
    """A classifier of images over `SaccadeViTModel`: a linear map of the image's vector."""

    def __init__(self, config: SaccadeViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = SaccadeViTModel(config)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **loss_options: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:  # fmt: skip
        """Logits `(B, num_labels)` of pixel_values `(B, channels, height, width)`, and with labels `(B,)` int64 the cross-entropy."""
        out = self.vit(pixel_values, output_hidden_states, True)
        logits = self.classifier(out.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **loss_options)
        result = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return result if return_dict is None or return_dict else result.to_tuple()


__all__ = ["SaccadeViTForImageClassification", "SaccadeViTModel", "SaccadeViTPreTrainedModel"]

register()
