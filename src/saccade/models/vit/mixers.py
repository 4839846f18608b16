"""Which mixer a spec stands for in an image, where every token reads all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, split_top_level
from saccade.methods import build_mixer
from saccade.methods.linear.softmax import Softmax
from saccade.methods.parallel import Parallel
from saccade.ops.attend import attend
from saccade.parts.linear.both_ways import TwoWayMixer
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.two_way import TwoWay


@dataclass(frozen=True, kw_only=True)
class FullAttention(Mixer):
    """Softmax attention of all tokens to all."""

    info = Info(slug="softmax", phase="mixer", needs=frozenset({"training"}), causality="bidirectional")

    def build(self, shape: MixerShape) -> TokenMixer:
        return FullAttentionMixer(shape)


class FullAttentionMixer(TwoWay):
    """The layer; quadratic in the tokens."""

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, k, v = self._heads(x)
        return self.o_proj(self.joined(attend(q, k, v, causal=False).out, x)), {}

    def naive(self, x: Tensor) -> Tensor:
        q, k, v = (heads.double() for heads in self._heads(x))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.o_proj(self.joined(weights @ v, x))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.k_proj is not None
        q, k, v = (heads_first(linear(x), self.heads) for linear in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v


def image_mixer(spec: str | Mixer, grid: tuple[int, int], token: bool = False) -> Mixer:
    """The mixer that a spec names, made to read an image of `grid` (height, width) patches, row after row.

    Bidirectional mixers are taken as they are; those that look at the image as a map get its grid where they name none. Mixers with a
    `bidirectional` field are read both ways. "softmax" without fields is attention of all tokens to all. Every other causal mixer is
    refused: it would see a part of the image only. token: whether a class token stands in front of the patches; a mixer that looks at a
    map then needs a `cls` field, which is set, or is refused. Several side by side (`"mala & softmax"`) are taken one by one.
    """
    if isinstance(spec, str) and len(parts := split_top_level(spec, "&")) > 1:
        # one by one first: "mala & softmax" as it stands would join one that is causal with one that is not
        return Parallel(branches=tuple(image_mixer(part, grid, token) for part in parts))
    mixer = build_mixer(spec)
    if isinstance(mixer, Parallel):
        return Parallel(branches=tuple(image_mixer(branch, grid, token) for branch in mixer.branches))
    if isinstance(mixer, Softmax):
        if mixer != Softmax():
            raise ValueError(f"{mixer.spec} is causal: in an image softmax takes no fields and reads all tokens, write 'softmax'")
        return FullAttention()
    if isinstance(mixer, TwoWayMixer):
        mixer = replace(mixer, bidirectional=True)
    if mixer.info.causality != "bidirectional":
        raise ValueError(
            f"{mixer.spec} is causal and would see a part of the image only: use a mixer that reads both ways, such as mala, inline, "
            "flatten, latte or softmax"
        )
    known = {field.name for field in fields(mixer)}
    if "grid" not in known:
        return mixer
    changes: dict[str, Any] = {} if getattr(mixer, "grid") else {"grid": grid}  # noqa: B009 (a field of some mixers only)
    if token:
        if "cls" not in known:
            raise ValueError(f"{mixer.spec} looks at the image as a map, in which a class token has no place: use pool='mean'")
        changes["cls"] = True
    return replace(mixer, **changes)


__all__ = ["FullAttention", "image_mixer"]
