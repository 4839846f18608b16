"""Mixers side by side in one layer: `"softmax(window=1024) & deltanet"`.

    y = mean_i norm_i(mixer_i(x)),    norm_i an RMS norm with its own weights

so that branches of different scale weigh alike at first (hymba, arXiv 2411.13676, joins attention and a state space model that way).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Method, Mixer, MixerShape, TokenMixer
from saccade.parts.linear import mean_of_norms


@dataclass(frozen=True, kw_only=True)
class Parallel(Mixer):
    """branches: the mixers, two or more, all causal or all bidirectional."""

    branches: tuple[Mixer, ...]

    def __post_init__(self) -> None:
        if len(self.branches) < 2:
            raise ValueError("mixers side by side are two or more: join their specs by &")
        if len({branch.info.causality == "bidirectional" for branch in self.branches}) > 1:
            raise ValueError(f"{self.spec} joins a bidirectional mixer with one that is not: use mixers of one kind")

    @property
    def info(self) -> Info:  # pyright: ignore[reportIncompatibleVariableOverride]
        parts = [branch.info for branch in self.branches]
        streaming = "streaming" if any(part.causality == "streaming" for part in parts) else parts[0].causality
        return Info(
            slug=" & ".join(part.slug for part in parts), phase="mixer", needs=frozenset().union(*(part.needs for part in parts)),
            causality=streaming,
        )  # fmt: skip

    @property
    def spec(self) -> str:
        return " & ".join(branch.spec for branch in self.branches)

    @property
    def members(self) -> tuple[Method, ...]:
        return self.branches

    def build(self, shape: MixerShape) -> TokenMixer:
        return ParallelMixer(shape, [branch.module(shape) for branch in self.branches])


class ParallelMixer(TokenMixer):
    """The layer: what each branch keeps stands under its number."""

    def __init__(self, shape: MixerShape, branches: list[TokenMixer]) -> None:
        super().__init__(shape)
        self.branches = nn.ModuleList(branches)
        self.norms = nn.Parameter(torch.ones(len(branches), shape.dim))
        self.batches_padding = all(branch.batches_padding for branch in branches)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        outs, kept = [], {}
        for index, branch in enumerate(self.branches):
            assert isinstance(branch, TokenMixer)
            out, kept[str(index)] = branch.mix(x, past.get(str(index), {}), call)
            outs.append(out)
        return mean_of_norms(outs, self.norms.unbind()), kept

    def naive(self, x: Tensor) -> Tensor:
        return mean_of_norms([branch.naive(x) for branch in self.branches], self.norms.unbind())  # pyright: ignore[reportCallIssue]
