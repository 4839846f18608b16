"""Learned token eviction (laLTE): softmax over a window and over tokens that a small convolutional scorer chose to keep, within a capacity.

    r_j = [k_j before its rotation, v_j] per key head;   x_j = W silu(conv(... silu(conv(r)))),  dilated convolutions that see both ways
    s_j = sigmoid(x_j) - 1/2;   a token is selected if s_j > 0, the first `sinks` tokens always
    query i sees j <= i  if  i - j <= window,  or j is selected (and, unless training, among the sinks + buffer best that left the window)
    v'_j = v_j (1 + s_j - s'_j), s' without gradient: the value stays, and ds_j = <dv_j, v_j>
    loss: mean of lambda_h relu(s), lambda_h of each head adapted so that about `buffer` tokens are selected (`TokenBudget`)

A score is final once the `margin` tokens after it are there, so it is taken then, from keys that were not rotated yet; that is before the
token leaves the window. It enters the buffer if it is selected and there is room or its score is above the least, which then leaves: the
best of all that left so far stay, the older of equal ones. Prompts are read by the same rule at every query, where the paper's prefill
takes the best at the prompt's end; so a prompt at once and token by token are the same even when the buffer overflows. Layers of this kind
stand between gated delta rules: `token_eviction_layers`.

Source: learnable-token-eviction, arXiv 2510.20787.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.cache.kept_keys import KeptKeys
from saccade.core import Call, Info, Mixer, MixerShape, Partial, TokenMixer, format_spec, merge, register
from saccade.parts.linear.band import band_partial
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.rotary import RotaryEmbedding
from saccade.parts.linear.tokens import last_tokens

ROWS = 256  # queries read at a time


@register
@dataclass(frozen=True, kw_only=True)
class LearnableTokenEviction(Mixer):
    """window: tokens before its own that a query sees. buffer: selected tokens kept behind it, per key head. sinks: first tokens, kept
    besides. kernels, dilations: of the scorer's convolutions, odd widths in tokens; half of what they see together is the margin. score:
    of a logit x, "sigmoid" (sigmoid(x) - 1/2) or "relu". dropout: on the inputs of the convolutions, in training. theta: base of the
    rotary embedding. bias: in the projections of q, k and v."""

    window: int = 768
    buffer: int = 512
    sinks: int = 4
    kernels: tuple[int, ...] = (3, 3, 3)
    dilations: tuple[int, ...] = (2, 2, 2)
    score: Literal["sigmoid", "relu"] = "sigmoid"
    dropout: float = 0.1
    theta: float = 10000.0
    bias: bool = False

    info = Info(
        slug="learnable-token-eviction", phase="mixer", needs=frozenset({"training"}),
        tiny={"window": 12, "buffer": 8, "sinks": 2, "dropout": 0.0},
        variants=(
            {"window": 5, "buffer": 100, "sinks": 0, "score": "relu", "dropout": 0.0, "bias": True},
            {"window": 2, "buffer": 0, "kernels": (3, 3), "dilations": (2, 1), "dropout": 0.0},
        ),
        opts_out={
            "constant": "how many tokens are selected is the data's choice, up to a capacity; in training the loss alone bounds it",
            "gradcheck": "a token is selected or not, and the scorer's gradient is an estimate",
            "state_gradient": "a score depends on tokens after it, so the gradient of its estimate is known when they are there",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("kernels", "dilations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.buffer, self.sinks) < 0 or self.window < 0:
            raise ValueError(f"window={self.window}, buffer={self.buffer}, sinks={self.sinks}: give at least 0 of each")
        if not self.kernels or len(self.kernels) != len(self.dilations) or any(k < 1 or k % 2 == 0 for k in self.kernels):
            raise ValueError(f"kernels={self.kernels}, dilations={self.dilations}: give one dilation for each kernel, of an odd width")
        if min(self.dilations) < 1:
            raise ValueError(f"dilations={self.dilations}: give at least 1")
        if self.window + 1 < self.margin:
            raise ValueError(
                f"a window of {self.window} tokens lets go of a token before the {self.margin} after it that its score needs: "
                "give a longer window or smaller kernels"
            )
        if self.score not in ("sigmoid", "relu"):
            raise ValueError(f"score={self.score!r} is not 'sigmoid' or 'relu'")
        if not 0 <= self.dropout < 1 or self.theta <= 0:
            raise ValueError(f"dropout={self.dropout}, theta={self.theta}: give a probability from 0 to below 1 and a positive base")

    @property
    def margin(self) -> int:
        """Tokens after its own, and before it, that a score depends on."""
        return sum((k - 1) * d for k, d in zip(self.kernels, self.dilations, strict=True)) // 2

    def build(self, shape: MixerShape) -> TokenMixer:
        if shape.head_dim % 2:
            raise ValueError(f"heads of {shape.head_dim} channels can't be rotated: give an even head_dim")
        return TokenEvictionMixer(shape, self)


class TokenScorer(nn.Module):
    """A stack of convolutions over the tokens for each key head apart, halving the channels, and a map to one logit."""

    def __init__(self, heads: int, channels: int, method: LearnableTokenEviction) -> None:
        super().__init__()
        self.method = method
        widths = [max(channels >> i, 1) for i in range(len(method.kernels) + 1)]
        self.convs = nn.ModuleList(
            nn.Conv1d(heads * a, heads * b, k, dilation=d, groups=heads)
            for a, b, k, d in zip(widths, widths[1:], method.kernels, method.dilations, strict=False)
        )
        self.head = nn.Conv1d(heads * widths[-1], heads, 1, groups=heads)
        for conv in (*self.convs, self.head):
            nn.init.kaiming_normal_(cast(nn.Conv1d, conv).weight, nonlinearity="relu")
        assert self.head.bias is not None
        # most tokens are selected at first
        nn.init.constant_(self.head.bias, 0.5)

    def forward(self, r: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """Scores `(B, Hk, L - 2 margin)` of the tokens in the middle of r `(B, L, Hk, C)`, in float32 at least.

        first, end `(B,)`: the place of r's first token, and the number of tokens there are; before the first and behind the last are
        zeros, in every layer.
        """
        places = first[:, None] + torch.arange(r.shape[1], device=r.device)
        x = r.to(torch.promote_types(r.dtype, torch.float32)).flatten(2).mT

        def real(x: Tensor, places: Tensor) -> Tensor:
            return x * ((places >= 0) & (places < end[:, None])).unsqueeze(1)

        x = real(x, places)
        for module, width, dilation in zip(self.convs, self.method.kernels, self.method.dilations, strict=True):
            conv, half = cast(nn.Conv1d, module), (width - 1) * dilation // 2
            x = F.dropout(x, self.method.dropout, self.training)
            places = places[:, half : places.shape[1] - half]
            x = F.silu(real(_convolved(conv, x), places))
        x = _convolved(self.head, x)
        return x.sigmoid() - 0.5 if self.method.score == "sigmoid" else x.relu()


class Routed(NamedTuple):
    """What a layer chose in its last training step: scores `(B, Hk, N)` with their gradient, which of them are selected, sinks among
    them, and which count `(B, 1, N)`: those whose tokens after them are known."""

    scores: Tensor
    selected: Tensor
    final: Tensor


class TokenEvictionMixer(TokenMixer):
    """The layer. Its projections have the names and layouts of a Llama's attention layer. routed: of the last step with gradients."""

    batches_padding = True

    def __init__(self, shape: MixerShape, method: LearnableTokenEviction) -> None:
        super().__init__(shape)
        self.method, self.heads, self.kv_heads = method, shape.heads, shape.kv_heads
        d = shape.head_dim
        self.q_proj = nn.Linear(shape.dim, self.heads * d, bias=method.bias)
        self.k_proj, self.v_proj = (nn.Linear(shape.dim, self.kv_heads * d, bias=method.bias) for _ in range(2))
        self.o_proj = nn.Linear(self.heads * d, shape.dim, bias=False)
        self.rotary = RotaryEmbedding(d, method.theta)
        self.scorer = TokenScorer(self.kv_heads, 2 * d, method)
        self.most = method.sinks + method.buffer
        self.routed: Routed | None = None

    def project(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q `(B, Hq, N, D)` and k `(B, Hk, N, D)`, turned to their positions, v, and the scorer's input `(B, N, Hk, 2D)`."""
        q = heads_first(self.q_proj(x), self.heads)
        k, v = (heads_first(project(x), self.kv_heads) for project in (self.k_proj, self.v_proj))
        return self.rotary(q, call.positions), self.rotary(k, call.positions), v, torch.cat([k, v], -1).transpose(1, 2)

    def watched(self, v: Tensor, scores: Tensor, places: Tensor, end: Tensor) -> Tensor:
        """v with the scores' gradient; notes what was chosen of these tokens at places `(B, N)`, `end (B,)` of them there by now."""
        final = (places < end[:, None] - self.method.margin).unsqueeze(1)
        if self.training:
            self.routed = Routed(scores, (scores > 0) | (places < self.method.sinks).unsqueeze(1), final)
        return v + v * (scores - scores.detach()).unsqueeze(-1).to(v.dtype)

    # -- many tokens, or one -----------------------------------------------------------------------------------------------

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, k, v, r = self.project(x, call)
        n, ring, margin = x.shape[1], self.method.window + 1, self.method.margin
        held = past or self._nothing(k, v, r)
        slots = torch.arange(n, device=x.device)
        # with every new token the score of the one `margin` before it is final; the gradient wants scores of the new ones too
        gradients = torch.is_grad_enabled()
        later = margin if gradients else 0
        seen = torch.cat([held["raw"].to(r.dtype), r], 1)
        scores = self.scorer(F.pad(seen, (0, 0, 0, 0, 0, later)), call.start - 2 * margin, call.ends)
        if gradients:
            v = self.watched(v, scores[..., margin:], call.start[:, None] + slots, call.ends)
        joined_k, joined_v = (torch.cat([held[name].to(t.dtype), t.transpose(1, 2)], 1) for name, t in (("k", k), ("v", v)))
        final = scores[..., :n].detach().transpose(1, 2)
        # and the one `ring` before it leaves the ring
        places = call.start[:, None] + slots - ring
        leaving = torch.cat([held["scores"], final], 1)[:, :n].masked_fill((places < self.method.sinks).unsqueeze(-1), torch.inf)
        there = places >= 0
        if call.lengths is not None:
            there = there & (slots < call.lengths[:, None])
        chosen = (leaving > 0) & there.unsqueeze(-1)
        gone = [t[:, :n].transpose(1, 2) for t in (joined_k, joined_v)] + [t.transpose(1, 2) for t in (leaving, chosen)]
        outs, store, bounded = [], held["store"], not self.training
        for begin in range(0, n, ROWS):
            rows = slice(begin, min(begin + ROWS, n))
            near = band_partial(
                q[:, :, rows], k[:, :, rows], v[:, :, rows], joined_k[:, begin : begin + ring], joined_v[:, begin : begin + ring],
                call.start + begin, window=ring,
            )  # fmt: skip
            band = Partial(near.out, (near.top + near.total.log()).squeeze(-1))
            part, store = self._far(q[:, :, rows], store, [t[:, :, rows] for t in gone], band, bounded)
            outs.append(part.out.to(x.dtype))
        y = self.o_proj(torch.cat(outs, 2).transpose(1, 2).flatten(2))
        if not call.keep:
            return y, {}
        new = (("k", k.transpose(1, 2)), ("v", v.transpose(1, 2)), ("raw", r), ("scores", final))
        return y, {"store": store, **{name: last_tokens(held[name].to(t.dtype), t, call.lengths) for name, t in new}}

    def _nothing(self, k: Tensor, v: Tensor, r: Tensor) -> dict[str, Any]:
        """What is kept before the first token: the ring, what the scorer still needs, the scores of the ring, and the chosen tokens."""
        b, ring, margin = k.shape[0], self.method.window + 1, self.method.margin
        wide = torch.promote_types(k.dtype, torch.float32)
        return {
            "k": k.new_zeros(b, ring, self.kv_heads, k.shape[3]), "v": v.new_zeros(b, ring, self.kv_heads, v.shape[3]),
            "raw": r.new_zeros(b, 2 * margin, *r.shape[2:]), "scores": r.new_zeros(b, ring - margin, self.kv_heads, dtype=wide),
            "store": KeptKeys.none(k, v),
        }  # fmt: skip

    def _far(self, q: Tensor, store: KeptKeys, gone: list[Tensor], band: Partial, bounded: bool) -> tuple[Partial, KeptKeys]:
        """Attention of q over the window `band` and the chosen tokens behind it, and the store with those that left the window.

        gone: keys, values, scores and choice `(B, Hk, n, ...)`; the token in slot t left before query t.
        """
        k, v, scores, chosen = gone
        n = q.shape[2]
        times = torch.arange(n, device=q.device)
        grown = store.add(k, v, chosen, score=scores, since=times.expand(chosen.shape))
        full = bounded and int(grown.counts.max()) > self.most
        if n == 1:
            grown = grown.without("since")
            grown = grown.best("score", self.most) if full else grown
            return grown.attend(q, state=band), grown
        if not full:
            return grown.attend(q, seen=store.counts.unsqueeze(-1) + chosen.cumsum(-1), state=band), grown.without("since")
        held = grown.rectangle()
        mask = self.visible(held.side["score"], held.valid, held.side["since"], times).repeat_interleave(self.heads // self.kv_heads, 1)
        part = partial_softmax(q, held.keys, held.values, mask)
        far = Partial(part.out, (part.top + part.total.log()).squeeze(-1))
        return merge(far, band), grown.best("score", self.most).without("since")

    def visible(self, scores: Tensor, chosen: Tensor, since: Tensor, times: Tensor) -> Tensor:
        """`(B, Hk, n, m)` bool: which of m tokens, chosen or not, that left the window at `since (B, Hk, m)` or earlier in the same order
        are among the best at times `(n,)`."""
        left = chosen.unsqueeze(2) & (since.unsqueeze(2) <= times[:, None])
        slots = torch.arange(scores.shape[-1], device=scores.device)
        other, own = scores.unsqueeze(2), scores.unsqueeze(3)
        better = (other > own) | ((other == own) & (slots < slots[:, None]))
        return left & (left.to(torch.float32) @ better.to(torch.float32).mT < self.most)

    # -- the definition ----------------------------------------------------------------------------------------------------

    def naive(self, x: Tensor) -> Tensor:
        call, n, margin = self.whole(x), x.shape[1], self.method.margin
        q, k, v, r = self.project(x, call)
        scores = self.scorer(F.pad(r, (0, 0, 0, 0, margin, margin)), call.start - margin, call.ends)
        v = self.watched(v, scores, call.positions, call.ends)
        i = torch.arange(n, device=x.device)
        ranked = scores.detach().masked_fill(i < self.method.sinks, torch.inf)
        selected, since = ranked > 0, (i + self.method.window + 1).expand(ranked.shape)
        far = selected.unsqueeze(2) & (since.unsqueeze(2) <= i[:, None])
        if not self.training:
            far = self.visible(ranked, selected, since, i)
        mask = far | ((i <= i[:, None]) & (i[:, None] - i <= self.method.window))
        out = partial_softmax(q, k, v, mask.repeat_interleave(self.heads // self.kv_heads, 1)).out.to(x.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    assert conv.bias is not None
    return F.conv1d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), dilation=conv.dilation[0], groups=conv.groups)


class TokenBudget(nn.Module):
    """The loss that holds the number of selected tokens near the buffer: `mean of lambda_h relu(s)`, with a lambda for each layer and head.

        loss = task_loss + budget()      after the model's forward pass in training
        budget.step()                    after each step of the optimizer

    Every `every` steps, a head that selects more than `high` times the buffer (a mean that forgets over half that many steps) has its
    lambda multiplied by `grow`, at most to `most`, from `least` at least; below `low` times it, it is divided by `shrink`, and 0 under
    `least`.
    Between the two it stays, but for a lambda of 0, which becomes `least`. (The paper's text grows it from `low` on; this is its code.)
    Its buffers are its state: save them with the optimizer's.
    """

    weights: Tensor
    kept: Tensor

    def __init__(
        self, model: nn.Module, *, every: int = 32, grow: float = 1.5, shrink: float = 2.0, low: float = 0.95, high: float = 1.0,
        least: float = 1e-9, most: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        layers = [part for part in model.modules() if isinstance(part, TokenEvictionMixer)]
        if not layers or len({layer.kv_heads for layer in layers}) > 1:
            raise ValueError(f"the model has {len(layers)} layers of learned token eviction: give one with some, of as many key heads")
        if every < 1 or grow <= 1 or shrink <= 1 or not 0 < low <= high or not 0 < least <= most:
            raise ValueError(
                f"every={every}, grow={grow}, shrink={shrink}, low={low}, high={high}, least={least}, most={most}: give at least 1 step, "
                "factors above 1, and pairs in their order"
            )
        self.every, self.grow, self.shrink, self.low, self.high, self.least, self.most = every, grow, shrink, low, high, least, most
        # a list in a tuple's clothes: the layers stay parts of their model alone
        self._layers = (layers,)
        self.register_buffer("weights", torch.zeros(len(layers), layers[0].kv_heads))
        self.register_buffer("kept", torch.zeros(len(layers), layers[0].kv_heads))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """The loss of the last forward pass; counts what it selected. ValueError where a layer has made none in training."""
        losses, counts = [], []
        for layer, weight in zip(self._layers[0], self.weights, strict=True):
            routed, layer.routed = layer.routed, None
            if routed is None:
                raise ValueError("a layer has selected nothing to count: run the model in training mode, with gradients, before each call")
            final = routed.final.to(routed.scores.dtype)
            number = final.sum((0, 2)).clamp(min=1.0)
            losses.append((weight.to(final.device)[:, None] * routed.scores.relu() * final).sum((0, 2)) / number)
            counts.append((routed.selected * final).sum((0, 2)) / number * final.shape[2])
        fresh = torch.stack(counts).detach().to(self.kept)
        share = 2 / (1 + max(self.every // 2, 1))
        self.kept.lerp_(fresh, share)
        return torch.stack(losses).mean()

    def step(self) -> None:
        """Count a step; at the end of `every` adapt the weights."""
        self.steps += 1
        if int(self.steps) % self.every:
            return
        room = torch.tensor([layer.method.buffer for layer in self._layers[0]], device=self.kept.device)[:, None]
        many, few = self.kept > self.high * room, self.kept < self.low * room
        found = torch.where(many, self.weights * self.grow, torch.where(few, self.weights / self.shrink, self.weights)).clamp(max=self.most)
        found = found.masked_fill(found < self.least, 0.0)
        self.weights.copy_(found.masked_fill((found == 0) & (self.kept > self.low * room), self.least))


def token_eviction_layers(count: int, *, pure: str = "kimi-linear(gate='token')", **fields: Any) -> list[str]:
    """The specs of a model's layers: `pure`, a gated delta rule, at even places and learned token eviction at odd ones, from 0.

    fields: of the layers, such as window. ValueError where count is out of range.
    """
    if count < 1:
        raise ValueError(f"{count} layers: give at least 1")
    spec = format_spec("learnable-token-eviction", fields)
    return [spec if index % 2 else pure for index in range(count)]
