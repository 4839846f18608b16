"""Lightning Attention-2: the tiled form of lightning attention, whose state stays on the chip while blocks of tokens stream through.

The mathematics is that of lightning attention, and so is the layer; the kernel is `saccade.ops.scan` with one slope per head. `form`
picks how it runs: "tiled" (the paper's loop over blocks: quadratic inside, the state across) or "token" (one token after another, which
the tiled form must equal). The paper's models train with the tiled form and decode with the other, which one token at a time always does.

Source: lightning-attention-2, arXiv 2401.04658.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.core import Info, MixerShape, TokenMixer, register
from saccade.methods.linear.lightning_attention import LightningAttention
from saccade.parts.linear import Recurrent


@register
@dataclass(frozen=True, kw_only=True)
class LightningAttention2(LightningAttention):
    """form: "tiled" or "token". The other fields are those of lightning-attention."""

    form: Literal["tiled", "token"] = "tiled"

    info = Info(slug="lightning-attention-2", phase="mixer", needs=frozenset({"training"}), variants=({"form": "token"},))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("tiled", "token"):
            raise ValueError(f"form={self.form!r} is not 'tiled' or 'token'")

    def build(self, shape: MixerShape) -> TokenMixer:
        made = super().build(shape)
        assert isinstance(made, Recurrent)
        made.impl = "auto" if self.form == "tiled" else "reference"
        return made
