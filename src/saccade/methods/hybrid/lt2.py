"""LT2: a stack of blocks run several times, with linear, windowed or full mixers inside.

    block:  h' = h + mixer(norm h),   h'' = h' + feed_forward(norm h')
    loop:   h^(u) = stack(h^(u-1)) + rho_u * h^(u-1),   u = 1 ... T,   rho (T, dim) zero at first, h^(0) = x
    across=True:  the output of block b in loop u gains sigma_ub * that of loop u - 1,   sigma zero at first

The weights are those of one stack, the states are not: each (loop, block) has its own, from zero. later_window narrows the full softmax
layers in all loops but the first. carry_state (inferred, off by default) hands the recurrent state of a block from loop to loop within a
token, and from the last loop to the first of the next token: T passes of the delta rule then correct one state T times per token.

A whole model is `SaccadeConfig(layers=schedule("4:1", 20, "kimi-linear(gate='token')", "softmax(gate=True)"), loops=4)`; this is the
looped stack as one layer, with the settings a decoder has not.

Source: lt2, arXiv 2605.20670.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, MixerState, TokenMixer, register
from saccade.methods.linear.softmax import SoftmaxMixer
from saccade.methods.stack import Block, Stack


@register
@dataclass(frozen=True, kw_only=True)
class LT2(Mixer):
    """layers: the mixers of the stack, as specs. loops: T. width: of the feed-forward layers (default: 8/3 dim; 0: none).
    later_window: window in tokens of full softmax layers from the second loop on, None: full in all. across: residuals between the same
    block's outputs in neighbouring loops. carry_state: recurrent states go on from loop to loop; runs token by token."""

    layers: tuple[str, ...] = ("kimi-linear(gate='token')",) * 4 + ("softmax(gate=True)",)
    loops: int = 4
    width: int | None = None
    later_window: int | None = None
    across: bool = False
    carry_state: bool = False

    info = Info(
        slug="lt2", phase="mixer", needs=frozenset({"training"}),
        tiny={"layers": ("kimi-linear(gate='token')", "softmax(window=8)"), "loops": 2, "width": 8},
        variants=(
            {"layers": ("softmax",), "later_window": 6, "loops": 2, "across": True, "width": 0},
            {"layers": ("deltanet(conv=2)", "softmax(window=4)"), "loops": 2, "carry_state": True, "width": 0},
        ),
        opts_out={"constant": "a full softmax layer keeps the keys and values of all tokens, once for each loop"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or self.loops < 1 or (self.width or 0) < 0:
            raise ValueError(
                f"{len(self.layers)} layers, loops={self.loops}, width={self.width}: give at least 1 layer, 1 loop and a width of 0"
            )
        if self.later_window is not None and self.later_window < 1:
            raise ValueError(f"later_window={self.later_window}: give at least 1 token, or None for no window")

    def build(self, shape: MixerShape) -> TokenMixer:
        return LT2Mixer(shape, self)


class LT2Mixer(TokenMixer):
    """The looped stack. State (loop, block) stands under its number, loop * blocks + block."""

    def __init__(self, shape: MixerShape, method: LT2) -> None:
        super().__init__(shape)
        self.method = method
        self.stack = Stack(
            method.layers, dim=shape.dim, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, loops=method.loops,
            width=-(-8 * shape.dim // 3) if method.width is None else method.width, max_length=shape.max_length,
        )  # fmt: skip
        if not self.stack.causal:
            raise ValueError(f"a looped stack decodes token by token and {list(method.layers)} has a bidirectional layer: use causal ones")
        self.across = nn.Parameter(torch.zeros(method.loops, len(method.layers), shape.dim)) if method.across else None
        # states that go on between loops are handed over row by row and token by token
        self.batches_padding = not method.carry_state

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        states: list[MixerState | None] = [None] * self.stack.slots
        if past:
            states = [MixerState(past[str(i)]["position"], past[str(i)]["values"]) for i in range(self.stack.slots)]
        if self.method.carry_state:
            y, states = self._walk(x, states, call)
        else:
            y, states = self._loops(x, states, replace(call, layers={}))
        return y, Stack.pack(states) if call.keep else {}

    def naive(self, x: Tensor) -> Tensor:
        if self.method.carry_state:
            return self._walk(x, [None] * self.stack.slots, self.whole(x))[0]
        outs: list[Tensor] = []
        for loop in range(self.method.loops):
            before = x
            for index, block in enumerate(self.stack.blocks):
                assert isinstance(block, Block)
                x = self._fed(block, x + self._mixer(block, loop).naive(block.norm(x)))
                x = self._joined(x, outs, loop, index)
            x = self._carried(x, before, loop)
        return x

    def _loops(self, x: Tensor, states: list[MixerState | None], call: Call) -> tuple[Tensor, list[MixerState | None]]:
        outs: list[Tensor] = []
        after: list[MixerState | None] = []
        for loop in range(self.method.loops):
            before = x
            for index, block in enumerate(self.stack.blocks):
                assert isinstance(block, Block)
                state = states[loop * len(self.stack.blocks) + index]
                if self.method.carry_state and loop:
                    state = _handed(after[(loop - 1) * len(self.stack.blocks) + index], state, call)
                y, state = self._mixer(block, loop).run(block.norm(x), state, call)
                after.append(state)
                x = self._joined(self._fed(block, x + y), outs, loop, index)
            x = self._carried(x, before, loop)
        return x, after

    def _walk(self, x: Tensor, states: list[MixerState | None], call: Call) -> tuple[Tensor, list[MixerState | None]]:
        """One token after the other, the first loop going on from the last loop's recurrent states."""
        outs, blocks = [], len(self.stack.blocks)
        for t in range(x.shape[1]):
            now = Call(positions=call.positions[:, t : t + 1], start=call.start + t, keep=True)
            first = [_handed(states[index - blocks], states[index], now) for index in range(blocks)]
            y, states = self._loops(x[:, t : t + 1], [*first, *states[blocks:]], now)
            outs.append(y)
        return torch.cat(outs, dim=1), states

    def _mixer(self, block: Block, loop: int) -> TokenMixer:
        mixer = block.mixer
        if loop and self.method.later_window is not None and isinstance(mixer, SoftmaxMixer) and mixer.method.window is None:
            # the same weights, behind a window
            mixer = copy.copy(mixer)
            mixer.method = replace(mixer.method, window=self.method.later_window)
        return mixer

    def _joined(self, x: Tensor, outs: list[Tensor], loop: int, index: int) -> Tensor:
        if self.across is not None and loop:
            x = x + self.across[loop, index] * outs[(loop - 1) * len(self.stack.blocks) + index]
        outs.append(x)
        return x

    def _carried(self, x: Tensor, before: Tensor, loop: int) -> Tensor:
        return x if self.stack.carry is None else x + self.stack.carry[loop] * before

    @staticmethod
    def _fed(block: Block, x: Tensor) -> Tensor:
        return x if block.feed_forward is None or block.feed_norm is None else x + block.feed_forward(block.feed_norm(x))


def _handed(source: MixerState | None, own: MixerState | None, call: Call) -> MixerState | None:
    """own, with the recurrent state of source in the place of its own; other things, such as keys or a convolution's inputs, stay."""
    if source is None or "s" not in source.values:
        return own
    # a convolution at the start of the text reads zeros, which is what it does without inputs
    values = {} if own is None else {name: x for name, x in own.values.items() if name not in ("s", "z")}
    values |= {name: source.values[name] for name in ("s", "z") if name in source.values}
    return MixerState(call.start, values)


def inherit(linear: LT2Mixer, full: LT2Mixer) -> list[str]:
    """Start a looped stack from one of full attention: everything with the same name and shape is copied, such as q, k, v, o, norms and
    feed-forward layers. Returns the names that keep their own start (gates, convolutions), which distillation then trains first."""
    theirs = full.state_dict()
    mine = linear.state_dict()
    shared = {name: theirs[name] for name, x in mine.items() if name in theirs and theirs[name].shape == x.shape}
    linear.load_state_dict(shared, strict=False)
    return [name for name in mine if name not in shared]
