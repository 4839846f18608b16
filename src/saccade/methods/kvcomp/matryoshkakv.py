"""MatryoshkaKV: keys and values in orthogonal coordinates of which any first few are a usable cache.

Each key/value head has a basis for its keys (after the rotary embedding) and one for its values, the leading columns holding most:

    offline   mean mu and covariance of calibration keys, values; U = eigenvectors by decreasing variance, columns signed so that the Cayley
              transform, through which they can be trained, exists
    stored    k' = (k - mu_k) U_k[:, :r_k],   v' = (v - mu_v) U_v[:, :r_v]                        ranks r_k, r_v for each layer and head
    read      logits = scale (q U_k[:, :r_k] k'^T + q mu_k),   out = P v' U_v[:, :r_v]^T + mu_v   (scale of all D)

Ranks are multiples of D / 8. A greedy search gives up an eighth of one head at a time, the one whose loss costs least, which leaves an
order that serves any budget. One basis serves a key/value head and all its query heads. The prompt is attended exactly; its
entries are rotated when it has ended, all but the last `recent`, and while decoding `interval` at a time.

Source: matryoshkakv, arXiv 2410.14731. `saccade.calibrate` gives the untrained bases and an order from one backward pass of the
model's loss: with g its gradient to a query's attention output, giving up a rank costs sum g^2 (change of the output)^2, to second order
what the predictions diverge by; the g^2 of a query are divided by their sum over layers, so that tokens the model is sure of count like
the others. `saccade.train.bases` trains bases and means (`train_bases`), and searches with the divergence itself (`search_ranks`), a
forward pass for each rank tried. Either way the text should ask for what will be asked: heads that retrieve look idle on text that never
does. Chosen here: that order; the exact tail (the paper has none), beside which the segment stands rightly since q mu_k stays in the
logits; U_v is applied to the output of a step instead of being folded into W_O, which an attached model keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.rotated import Bases, RotatedSegment
from saccade.core import CachePolicy, Info, LayerContext, StoredKV, register
from saccade.parts.cayley import signed
from saccade.parts.pca import principal_basis, second_moment
from saccade.parts.rank_search import LEVELS, error_table, even_shares, greedy_shares, levels_at, rank_of
from saccade.parts.static.gradient import GradientCalibrated

SAMPLES, SEARCHED, QUERIES = 4, 2048, 128  # ranks are searched on the first samples: keys and queries of each
_BASES = "matryoshkakv.bases"


@register
@dataclass(frozen=True, kw_only=True)
class MatryoshkaKV(CachePolicy, GradientCalibrated):
    """budget: share of coordinates that is kept, the mean over layers, heads, keys and values, in [1/8, 1] (the paper's 60% compression:
    0.4). recent: newest tokens that stay as they are. interval: tokens that are rotated together while decoding. even: the same
    rank in every head in place of searched ones.

    A plan serves any fields; its order of ranks is searched with the newest `recent` keys of a query as they are.
    """

    budget: float = 0.4
    recent: int = 32
    interval: int = 64
    even: bool = False

    info = Info(
        slug="matryoshkakv", phase="cache", needs=frozenset({"calibration"}), frees_memory=True, append_only=False, encodes=True,
        opened={"budget": 1.0}, tiny={"recent": 4, "interval": 8},
        opts_out={"stepwise": "rotates when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not 1 / LEVELS <= self.budget <= 1:
            raise ValueError(f"matryoshkakv(budget={self.budget!r}) is not a share of the coordinates: give a number from 1/{LEVELS} to 1")
        for name, least in (("recent", 0), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"matryoshkakv({name}={value!r}) is not a whole number of at least {least}")
        if not isinstance(self.even, bool):
            raise ValueError(f"matryoshkakv(even={self.even!r}) is not True or False")

    # -- the offline part --------------------------------------------------------------------------------------------------

    def loss_tokens(self, n: int) -> int:
        return n - 1

    def measure_gradient(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Tensor]:
        """Sums over tokens and second moments; and of the first row the first keys, with their last queries, others spread over
        the rest, and the squared gradients of these queries' outputs."""
        n = min(k.shape[2], SEARCHED)
        late = min(n, QUERIES // 2)
        spread = torch.linspace(0, max(n - late - 1, 0), min(n - late, QUERIES - late), device=q.device).long()
        places = torch.cat([spread, torch.arange(n - late, n, device=q.device)])
        found = {"tokens": torch.tensor(float(k.shape[0] * k.shape[2]), dtype=torch.float64, device=k.device)}
        for name, x in (("key", k), ("value", v)):
            found |= {f"{name}_sum": x.to(torch.float64).sum((0, 2)), f"{name}_moment": second_moment(x)}
        cap = torch.tensor(float(ctx.softcap or 0.0), device=k.device)
        sample = {"q": q[0, :, places] * ctx.scale, "k": k[0, :, :n], "v": v[0, :, :n], "weight": d_out[0, :, places].double().square()}
        return {**found, **{f"sample_{name}": x.clone() for name, x in {**sample, "places": places, "softcap": cap}.items()}}

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums add up; the first samples stand side by side, numbered."""
        added = {name: x for name, x in found.items() if not name.startswith("sample_")}
        index = sum(name.endswith("_places") for name in sums)
        sample = {f"sample{index}_{name.removeprefix('sample_')}": x for name, x in found.items() if name not in added}
        return {**super().combine(sums, added), **(sample if index < SAMPLES else {})}

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        plans, tables = {}, []
        count = sum(name.endswith("_places") for name in next(iter(sums.values())))
        samples = {layer: [_sample(own, i) for i in range(count)] for layer, own in sums.items()}
        # a query counts as much as any other, however sure the model is of its token
        sensitive = [torch.stack([own[i]["weight"].sum((0, 2)) for own in samples.values()]).sum(0) for i in range(count)]
        for layer, own in sums.items():
            found = {}
            for name in ("key", "value"):
                mean = own[f"{name}_sum"] / own["tokens"]
                spread = own[f"{name}_moment"] / own["tokens"] - mean.unsqueeze(-1) * mean.unsqueeze(-2)
                found |= {f"{name}_basis": signed(principal_basis(spread)[0]), f"{name}_mean": mean.float()}
            plans[layer] = found
            tables.append(torch.stack([_errors(*pair, found, self.recent) for pair in zip(samples[layer], sensitive, strict=True)]).sum(0))
        for found, shares in zip(plans.values(), greedy_shares(tables), strict=True):
            found |= {"key_shares": shares[0], "value_shares": shares[1]}
        return plans

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= self.recent + self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        n = kv.length - self.recent
        if n <= 0:
            return
        if kv.valid is not None:
            raise ValueError("matryoshkakv rotates heads that hold equally many tokens: this cache was thinned head by head before")
        keys, values, positions = kv.keys[:, :, :n], kv.values[:, :, :n], kv.side["positions"][:, :, :n]
        kv.seal(RotatedSegment.encode(keys, values, positions, self._bases(ctx, keys), self.ranks(ctx, keys, values)), n)

    def ranks(self, ctx: LayerContext, keys: Tensor, values: Tensor) -> list[tuple[int, int]]:
        """Of keys and values of each head."""
        shares = torch.stack([ctx.found("key_shares"), ctx.found("value_shares")])
        levels = levels_at(even_shares(keys.shape[1]) if self.even else shares, self.budget).tolist()
        return [(rank_of(a, keys.shape[-1]), rank_of(b, values.shape[-1])) for a, b in zip(*levels, strict=True)]

    def _bases(self, ctx: LayerContext, keys: Tensor) -> Bases:
        """The plan's, on the keys' device once for all segments of the layer."""
        if _BASES not in ctx.state:
            names = ("key_basis", "key_mean", "value_basis", "value_mean")
            ctx.state[_BASES] = Bases(**{name: ctx.found(name).to(keys.device) for name in names})
        return ctx.state[_BASES]


def _sample(sums: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    own = f"sample{index}_"
    return {name.removeprefix(own): x for name, x in sums.items() if name.startswith(own)}


def _errors(sample: dict[str, Tensor], sensitive: Tensor, found: dict[str, Tensor], recent: int) -> Tensor:
    """`error_table` of a layer's sample in its new bases; sensitive `(m,)`: squared gradients of its queries over all layers."""
    bases, means = ({name: found[f"{name}_{what}"].to(torch.float64) for name in ("key", "value")} for what in ("basis", "mean"))
    k, v = ((sample[name[0]].to(torch.float64) - means[name].unsqueeze(1)) @ bases[name] for name in ("key", "value"))
    q = (sample["q"].to(torch.float64).unflatten(0, (len(k), -1)) @ bases["key"].unsqueeze(1)).flatten(0, 1)
    weight = sample["weight"] / sensitive.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)
    cap = float(sample["softcap"]) or None
    return error_table(q, k, v, weight, bases["value"], sample["places"], recent=recent, softcap=cap)
