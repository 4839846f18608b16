"""A stack of blocks, each a mixer and a feed-forward layer: what decoders are made of, and mixers that have layers inside.

    h = x + mixer(norm x),    y = h + feed_forward(norm h)

With loops > 1 the same blocks run several times (lt2, arXiv 2605.20670): h^(u) = stack(h^(u-1)) + rho_u * h^(u-1), rho_u `(dim,)` zero at
first; each (loop, layer) has a state of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.core import Alignment, Call, Mixer, MixerShape, MixerState
from saccade.methods import build_mixer
from saccade.parts.linear.feedforward import SwiGLU

States = Sequence[MixerState | None]


class Block(nn.Module):
    """One pre-norm layer. width: of the feed-forward layer, 0 for none."""

    def __init__(self, mixer: Mixer, shape: MixerShape, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.dim, eps=eps)
        self.mixer = mixer.module(shape)
        self.feed_norm = nn.RMSNorm(shape.dim, eps=eps) if width else None
        self.feed_forward = SwiGLU(shape.dim, width) if width else None

    def forward(self, x: Tensor, state: MixerState | None, call: Call) -> tuple[Tensor, MixerState | None]:
        y, state = self.mixer.run(self.norm(x), state, call)
        x = x + y
        if self.feed_forward is not None and self.feed_norm is not None:
            x = x + self.feed_forward(self.feed_norm(x))
        return x, state


class Stack(nn.Module):
    """layers: one spec (or Mixer) a layer. width: of the feed-forward layers, 0 for none. loops: how often the stack runs."""

    def __init__(
        self, layers: Sequence[str | Mixer], *, dim: int, heads: int, kv_heads: int = 0, head_dim: int = 0, width: int = 0,
        max_length: int | None = None, loops: int = 1, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        if not layers or loops < 1:
            raise ValueError(f"a stack of {len(layers)} layers run {loops} times does nothing: give at least one layer and one loop")
        self.blocks = nn.ModuleList()
        for index, layer in enumerate(layers):
            shape = MixerShape(
                dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layer=index, layers=len(layers), max_length=max_length
            )
            self.blocks.append(Block(build_mixer(layer), shape, width, eps))
        self.loops = loops
        self.carry = nn.Parameter(torch.zeros(loops, dim)) if loops > 1 else None
        # set by transformers' switch for them
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None

    @property
    def slots(self) -> int:
        """States the stack has: one for each layer of each loop."""
        return self.loops * len(self.blocks)

    @property
    def causal(self) -> bool:
        return all(block.mixer.causality != "bidirectional" for block in self.blocks)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self, x: Tensor, states: States | None = None, *, positions: Tensor | None = None, valid: Tensor | None = None, keep: bool = True,
        every: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[MixerState | None]]:  # fmt: skip
        """(y `(B, N, dim)`, states after the last token) of x `(B, N, dim)`; arguments as those of a TokenMixer.

        every: a list to which the input of each layer is added.
        """
        states = [None] * self.slots if states is None else states
        if len(states) != self.slots:
            raise ValueError(f"{len(states)} states for a stack of {self.slots}: give what the call before returned")
        first = states[0]
        start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if first is None else first.position
        # once for all layers
        rows = Alignment.of(valid)
        x = x if rows is None else rows.align(x)
        call = Call.at(start, x.shape[1], positions, rows, keep=keep)
        after: list[MixerState | None] = []
        for loop in range(self.loops):
            before = x
            for index, block in enumerate(self.blocks):
                if every is not None:
                    every.append(x if rows is None else rows.back(x))
                x, state = self._run(block, x, states[loop * len(self.blocks) + index], call)
                after.append(state)
            x = x if self.carry is None else x + self.carry[loop] * before
        return x if rows is None else rows.back(x), after

    @staticmethod
    def pack(states: States) -> dict[str, Any]:
        """States as what a mixer keeps, for a mixer that has a stack inside."""
        return {str(i): {"position": state.position, "values": state.values} for i, state in enumerate(states) if state is not None}

    @staticmethod
    def unpack(kept: Mapping[str, Any]) -> list[MixerState | None] | None:
        """The inverse of `pack`; None where nothing was kept yet."""
        return [MixerState(one["position"], one["values"]) for one in kept.values()] or None

    def _run(self, block: nn.Module, x: Tensor, state: MixerState | None, call: Call) -> tuple[Tensor, MixerState | None]:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return block(x, state, call)
        if call.keep:
            raise ValueError("gradient checkpointing runs layers twice, which a cache doesn't survive: pass use_cache=False")
        if self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func(block, x, state, call)
        return checkpoint(block, x, state, call, use_reentrant=False)  # pyright: ignore[reportReturnType]
