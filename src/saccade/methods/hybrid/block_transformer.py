"""Block Transformer: a lower half that sees blocks of tokens, an upper half that sees one block, and a vector between them.

    e_i = embed(x of block i)                                        L tokens are one vector
    c_i = norm(block decoder(e_0 ... e_i))                           causal over blocks: N / L positions, N / L keys and values
    token decoder, causal, inside block i + 1 alone, from c_i:
      "prefix":  [P_1 c_i ... P_p c_i, t_1 ... t_{L-1}]     "add":  [s, t_1 ... t_{L-1}] + P c_i
      "cross":   [s, t_1 ... t_{L-1}], each layer reads P_1 c_i ... P_p c_i

What stands last before t_1 gives the output of the last token of block i, that of t_j the output of t_j: each predicts its next token.
Blocks meet in c alone. In front of the sequence stand a block of learned padding, from which the first block gets its context, and
`shift` more of it in the first block, drawn anew in training so that blocks may begin anywhere. The two halves count positions apart:
blocks, and places in [front, block].

A whole model is `SaccadeConfig(layers=["block-transformer"], intermediate_size=0)`: the two token tables are maps of the model's one table,
and the model's residual around the layer adds each token to its own output.

Source: block-transformer, arXiv 2406.02657.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.cache.kv_store import KVStore
from saccade.cache.segment import Rectangle
from saccade.cache.tail import Tail
from saccade.core import Call, Info, Mixer, MixerShape, MixerState, TokenMixer, register
from saccade.methods import build_mixer
from saccade.methods.linear.softmax import Softmax
from saccade.methods.stack import Block, Stack
from saccade.parts.linear.block_embedder import BlockEmbedder, Embedding, OpenAttention

States = Sequence[MixerState | None] | None


@register
@dataclass(frozen=True, kw_only=True)
class BlockTransformer(Mixer):
    """length: L, tokens of a block. block_layers, token_layers: the mixers of the two halves: specs, one, or a number of softmax layers.
    embedder: "concat" (a map to dim / L channels for each token, joined), "sum", or "cls" (a small encoder of encoder_layers). join: how a
    context reaches the tokens. prefix: p, vectors made of a context ("add": one). width: of the feed-forward layers (default: 8/3 dim; 0:
    none). shift: padding tokens in the first block, below L; "random": drawn for each call in training, 0 else. skip_prompt: where a state
    is kept and not in training, run the token decoder in the last block of a call alone, and give 0 for the tokens before: for generation,
    which needs their outputs no more."""

    length: int = 4
    block_layers: int | str | tuple[str, ...] = 12
    token_layers: int | str | tuple[str, ...] = 12
    embedder: Embedding = "concat"
    encoder_layers: int = 3
    join: Literal["prefix", "add", "cross"] = "prefix"
    prefix: int = 2
    width: int | None = None
    shift: int | Literal["random"] = "random"
    skip_prompt: bool = False

    info = Info(
        slug="block-transformer", phase="mixer", needs=frozenset({"training"}),
        tiny={"block_layers": 2, "token_layers": 2, "width": 8, "shift": 0},
        variants=(
            {"length": 3, "block_layers": 1, "token_layers": 1, "embedder": "sum", "join": "add", "shift": 2},
            {"block_layers": 1, "token_layers": 2, "embedder": "cls", "join": "cross", "shift": 1},
            {"length": 1, "block_layers": 1, "token_layers": 1, "prefix": 1, "width": 8, "shift": 0},
            {"block_layers": ("deltanet",), "token_layers": ("deltanet(conv=2)",), "width": 0, "shift": 3},
        ),
        opts_out={"constant": "the keys and values of all blocks are kept, one of each for a block"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("block_layers", "token_layers"):
            given = getattr(self, name)
            if not isinstance(given, (int, str)):
                object.__setattr__(self, name, tuple(given))
            if len(_specs(given)) < 1:
                raise ValueError(f"{name}={given!r}: give at least one layer")
        if self.embedder not in ("concat", "sum", "cls"):
            raise ValueError(f"embedder={self.embedder!r} is not 'concat', 'sum' or 'cls'")
        if self.join not in ("prefix", "add", "cross"):
            raise ValueError(f"join={self.join!r} is not 'prefix', 'add' or 'cross'")
        for name in ("length", "prefix", "encoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if (self.width or 0) < 0:
            raise ValueError(f"width={self.width}: give 0 for no feed-forward layers, or None for 8/3 of dim")
        if self.shift != "random" and not (isinstance(self.shift, int) and 0 <= self.shift < self.length):
            raise ValueError(f"shift={self.shift!r}: give 'random' or a number from 0 to below the {self.length} tokens of a block")

    def build(self, shape: MixerShape) -> TokenMixer:
        return BlockMixer(shape, self)


class TokenDecoder(nn.Module):
    """The upper half. A run is the front that a context gives and up to L - 1 tokens: `front` vectors, then theirs."""

    def __init__(self, shape: MixerShape, method: BlockTransformer, width: int) -> None:
        super().__init__()
        self.join, count = method.join, 1 if method.join == "add" else method.prefix
        self.front = count if method.join == "prefix" else 1
        longest = self.front + method.length - 1
        self.stack = _stack([_within(spec, longest) for spec in _specs(method.token_layers)], shape, width, longest)
        self.project = nn.Linear(shape.dim, count * shape.dim, bias=False)
        self.table = nn.Linear(shape.dim, shape.dim, bias=False)
        self.first = None if method.join == "prefix" else nn.Parameter(torch.randn(shape.dim))
        self.cross, self.cross_norms = nn.ModuleList(), nn.ModuleList()
        if method.join == "cross":
            self.cross.extend(OpenAttention(shape) for _ in range(self.stack.slots))
            self.cross_norms.extend(nn.RMSNorm(shape.dim, eps=1e-6) for _ in range(self.stack.slots))

    def inputs(self, x: Tensor, context: Tensor, begins: bool) -> Tensor:
        """What a run reads of tokens x `(B, m, dim)` behind a context `(B, dim)`, after its front where it begins."""
        rows = self.table(x)
        if begins:
            front = self._vectors(context) if self.first is None else self.first.to(x.dtype).expand(x.shape[0], 1, -1)
            rows = torch.cat([front, rows], dim=1)
        return rows + self._vectors(context) if self.join == "add" else rows

    def forward(self, rows: Tensor, context: Tensor, states: States, keep: bool) -> tuple[Tensor, list[MixerState | None]]:
        """(outputs `(B, m, dim)`, states) of the next inputs of runs `(B, m, dim)`, contexts `(B, dim)`."""
        if self.join != "cross":
            return self.stack(rows, states, keep=keep)
        before = [None] * self.stack.slots if states is None else states
        start = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device) if before[0] is None else before[0].position
        call, after = Call.at(start, rows.shape[1], None, None, keep=keep), []
        for index, state in enumerate(before):
            y, state = self._block(index).mixer.run(self._block(index).norm(rows), state, call)
            rows = self._read(index, rows + y, context)
            after.append(state)
        return rows, after

    def naive(self, rows: Tensor, context: Tensor) -> Tensor:
        """`forward` of whole runs, by the definitions of their layers."""
        for index in range(self.stack.slots):
            rows = self._read(index, rows + self._block(index).mixer.naive(self._block(index).norm(rows)), context)
        return rows

    def _read(self, index: int, rows: Tensor, context: Tensor) -> Tensor:
        """The layer after its mixer: the context, where layers read it, and the feed-forward layer."""
        if self.join == "cross":
            rows = rows + self.cross[index](self.cross_norms[index](rows), self._vectors(context))
        return _fed(self._block(index), rows)

    def _vectors(self, context: Tensor) -> Tensor:
        return self.project(context).unflatten(-1, (-1, context.shape[-1]))

    def _block(self, index: int) -> Block:
        block = self.stack.blocks[index]
        assert isinstance(block, Block)
        return block


class BlockMixer(TokenMixer):
    """The layer. Kept: the lower half's states, those of the run that isn't over and its context, the tokens of its block."""

    def __init__(self, shape: MixerShape, method: BlockTransformer) -> None:
        super().__init__(shape)
        self.method = method
        width = -(-8 * shape.dim // 3) if method.width is None else method.width
        self.embedder = BlockEmbedder(shape, method.length, method.embedder, layers=method.encoder_layers, width=width)
        longest = None if shape.max_length is None else shape.max_length // method.length + 2
        self.blocks = _stack(_specs(method.block_layers), shape, width, longest)
        self.norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.decoder = TokenDecoder(shape, method, width)
        self.pad = nn.Parameter(torch.randn(shape.dim))

    def contexts(self, x: Tensor, states: States, keep: bool) -> tuple[Tensor, list[MixerState | None]]:
        """(c `(B, M, dim)`, states) of the next M blocks x `(B, M, L, dim)`."""
        c, after = self.blocks(self.embedder(x), states, keep=keep)
        return self.norm(c), after

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        if past and bool((past["shift"] != past["shift"][0]).any()):
            # rows whose blocks begin at different tokens
            y, state = self._row_by_row(x, past, call, call.keep)
            return y, {} if state is None else state.values
        size, front, (b, n) = self.method.length, self.decoder.front, x.shape[:2]
        shift = int(past["shift"][0]) if past else self._shift()
        filled = (int(call.start[0]) + shift) % size
        held = past["held"][:, :filled].to(x.dtype) if past else self._padding(x, filled)
        tokens = torch.cat([held, x], dim=1)
        whole = tokens.shape[1] // size
        full, rest = tokens[:, : whole * size].unflatten(1, (whole, size)), tokens[:, whole * size :]
        if past:
            blocks, run = _unpack(past["blocks"], self.blocks), _unpack(past["run"], self.decoder.stack)
            found, context = x[:, :0], past["context"].to(x.dtype)
            if whole:
                found, blocks = self.contexts(full, blocks, call.keep)
        else:
            run, padded = None, torch.cat([self._padding(x, size).unsqueeze(1), full], dim=1)
            found, blocks = self.contexts(padded, None, call.keep)
            context, found = found[:, 0], found[:, 1:]
        skips = self.method.skip_prompt and call.keep and not self.training
        new = min(n, size - 1 - filled)  # tokens that go on with the run at hand
        outs = []
        if new and not (skips and whole):
            rows = self.decoder.inputs(tokens[:, filled if past else 0 : size - 1], context, not past)
            out, run = self.decoder(rows, context, run, call.keep and not whole)
            outs.append(out[:, -new:])
        if whole:
            context = found[:, -1]
            if skips:
                outs = [x.new_zeros(b, n - 1 - rest.shape[1], self.dim)]
            elif whole > 1:
                # every block that is full runs by itself
                earlier, inside = found[:, :-1].flatten(0, 1), full[:, 1:, :-1].flatten(0, 1)
                out, _ = self.decoder(self.decoder.inputs(inside, earlier, True), earlier, None, False)
                outs.append(out[:, front - 1 :].unflatten(0, (b, -1)).flatten(1, 2))
            out, run = self.decoder(self.decoder.inputs(rest, context, True), context, None, call.keep)
            outs.append(out[:, front - 1 :])
        kept: dict[str, Any] = {}
        if call.keep:
            assert run is not None
            kept = {
                "blocks": Stack.pack(blocks), "run": Stack.pack(run), "context": context,
                "held": F.pad(rest, (0, 0, 0, size - rest.shape[1])), "shift": torch.full_like(call.start, shift),
            }  # fmt: skip
        return torch.cat(outs, 1), kept

    def naive(self, x: Tensor) -> Tensor:
        size, shift = self.method.length, self._shift()
        tokens = torch.cat([self._padding(x, size + shift), x], dim=1)
        c = self.embedder(tokens[:, : tokens.shape[1] // size * size].unflatten(1, (-1, size)))
        for block in self.blocks.blocks:
            assert isinstance(block, Block)
            c = _fed(block, c + block.mixer.naive(block.norm(c)))
        c, outs = self.norm(c), []
        for index in range(c.shape[1]):
            # the block after c_index, but for its last token, whose output the next run gives
            inside = tokens[:, (index + 1) * size : (index + 2) * size - 1]
            out = self.decoder.naive(self.decoder.inputs(inside, c[:, index], True), c[:, index])
            outs.append(out[:, self.decoder.front - 1 :])
        # the first output is that of the last padding of the block in front
        return torch.cat(outs, 1)[:, 1 + shift :]

    def _shift(self) -> int:
        if self.method.shift != "random":
            return self.method.shift
        return int(torch.randint(self.method.length, (1,))) if self.training else 0

    def _padding(self, x: Tensor, n: int) -> Tensor:
        return self.pad.to(x.dtype).expand(x.shape[0], n, -1)


def _specs(layers: int | str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(layers, str):
        return (layers,)
    return ("softmax",) * layers if isinstance(layers, int) else layers


def _stack(layers: Sequence[str | Mixer], shape: MixerShape, width: int, longest: int | None) -> Stack:
    made = Stack(
        layers, dim=shape.dim, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, width=width, max_length=longest
    )
    if not made.causal:
        raise ValueError(f"both halves decode step by step and {list(map(str, layers))} has a bidirectional layer: use causal ones")
    return made


def _within(spec: str, longest: int) -> Mixer:
    """The mixer, with a window as long as the longest run in the place of none: the same outputs from as many bytes at every length."""
    method = build_mixer(spec)
    return replace(method, window=longest) if isinstance(method, Softmax) and method.window is None else method


def _fed(block: Block, x: Tensor) -> Tensor:
    return x if block.feed_forward is None or block.feed_norm is None else x + block.feed_forward(block.feed_norm(x))


def _unpack(kept: Mapping[str, Any], stack: Stack) -> list[MixerState | None]:
    states: list[MixerState | None] = []
    for index in range(stack.slots):
        one = kept[str(index)]
        _close_gaps(one["values"])
        states.append(MixerState(one["position"], one["values"]))
    return states


def _close_gaps(values: Mapping[str, Any]) -> None:
    """Drop the padding among the keys of a row that comes alone: rows whose blocks end at different steps would gather it without end."""
    for value in values.values():
        if isinstance(value, dict):
            _close_gaps(value)
        elif isinstance(value, KVStore):
            tail = value.layer.tail
            if tail is not None and tail.real is not None and tail.keys.shape[0] == 1:
                real = tail.real[0]
                keys, content, positions = (x[:, :, real] for x in (tail.keys, tail.values, tail.side["positions"]))
                value.layer.tail = Tail(Rectangle(keys, content, {"positions": positions}))
