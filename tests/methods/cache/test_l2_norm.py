"""L2 norm (l2-norm, 2406.11430): the claims of the paper, on constructed data."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import Single, random_qkv
from tests.contract.harness import error, llama, logits, tokens
from tests.methods.cache.needles import pocket, prompts
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.methods import build
from saccade.methods.cache.l2_norm import L2Norm
from saccade.ops import decode
from saccade.parts.eviction_loss import eviction_loss
from saccade.parts.keep import keep_best
from saccade.parts.mass_sums import mass_sums

ALWAYS = {"prune_after": 0, "skip_layers": ()}


def anticorrelated(n: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Keys whose norm falls as their logit rises: key j has logit -j / 10 with every query, and norm 1 + j / 10."""
    q, k, v = random_qkv(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).double() / 10
    q = torch.zeros_like(q)
    q[..., 0] = -(8**0.5)
    k[..., 0] = order
    rest = k[..., 1:] / k[..., 1:].norm(dim=-1, keepdim=True)
    k[..., 1:] = rest * ((1 + order) ** 2 - order**2).sqrt().unsqueeze(-1)
    return q, k, v


def kept_by(scores: Tensor, q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """The next query's output over the `count` entries with the highest scores."""
    single = Single(None)
    single.feed(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
    slots = single.layer.open()
    keep_best(slots, scores[..., :-1], count)
    single.layer.close([(None, slots)])
    return single.feed(*(x[:, :, -1:] for x in (q, k, v)))


def test_low_norm_beats_chance_beats_high_norm() -> None:
    q, k, v = anticorrelated()
    norms = k.norm(dim=-1)
    dense = decode(q[:, :, -1:], k, v).out
    chance = torch.rand(norms.shape, generator=torch.Generator().manual_seed(0))
    low, some, high = ((kept_by(s, q, k, v, 60) - dense).norm() for s in (-norms, chance, norms))
    assert low < 0.1 * some and some < 0.5 * high


def test_policy_keeps_the_smallest_norms_and_the_newest() -> None:
    q, k, v = random_qkv(100, batch=2)
    single = Single(L2Norm(budget=0.3, recent=5, **ALWAYS))
    single.feed(q, k, v)
    single.end_prompt()
    for row in range(2):
        for head, positions in enumerate(single.kept(row)):
            order = k[row, head, :95].norm(dim=-1).argsort()[:25]
            assert positions == [*sorted(order.tolist()), 95, 96, 97, 98, 99]


def test_norms_are_the_same_before_and_after_rope() -> None:
    """Keys are stored turned; turning keeps norms, so the choice is that of unturned keys."""
    with capture(llama()) as layers, torch.no_grad():
        llama()(tokens(1, 50))
        llama()(tokens(1, 50), position_ids=torch.arange(900, 950)[None])
    assert error(layers[0].k, layers[2].k) > 0.1
    assert error(layers[0].k.norm(dim=-1), layers[2].k.norm(dim=-1)) < 1e-6


def test_ratio_1_is_the_identity_and_order_does_not_matter() -> None:
    model, ids = llama(), tokens(2, 60)
    dense = logits(model, ids, steps=10)
    with saccade.attach(model, cache=L2Norm(budget=1.0, **ALWAYS)):
        assert error(logits(model, ids, steps=10), dense) < 1e-9
    q, k, v = random_qkv(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert error(decode(q[:, :, -1:], k, v).out, decode(q[:, :, -1:], k[:, :, order], v[:, :, order]).out) < 1e-9


def test_short_caches_and_skipped_layers_are_left_alone() -> None:
    model, ids = llama(), tokens(1, 60)
    with saccade.attach(model, cache=L2Norm(budget=0.5, skip_layers=(0,), prune_after=40, recent=4)) as handle:
        logits(model, ids, steps=1)
        assert handle.stats().kept == [[60, 60], [31, 31]]
        logits(model, ids[:, :40], steps=1)
        assert handle.stats().kept == [[40, 40], [40, 40]]


def test_prunes_again_whenever_the_limit_is_passed() -> None:
    q, k, v = random_qkv(200)
    single = Single(L2Norm(budget=20, prune_after=30, recent=4, skip_layers=()))
    single.feed(q[:, :, :50], k[:, :, :50], v[:, :, :50])
    sizes = []
    for i in range(50, 100):
        single.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))
        sizes.append(single.layer.physical)
    # the prompt left 20; each time 31 are there, 20 stay
    assert sizes[:11] == [*range(21, 31), 20] and sizes[11:21] == [*range(21, 31)] and max(sizes) == 30


def test_eviction_loss() -> None:
    """Y summed over m: 0 for perfect agreement, by hand for a small case, positive for chance."""
    mass = torch.tensor([[[4.0, 1.0, 3.0, 2.0]]])
    assert float(eviction_loss(mass * 10, mass)) == 0.0
    # dropped 4, 1, 3, 2 in turn: 4 - 1, 5 - 3, 8 - 6, 10 - 10
    assert float(eviction_loss(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), mass)) == 7.0
    q, k, _ = anticorrelated()
    received = mass_sums(q[:, :, -1:], k, scale=8**-0.5)
    assert float(eviction_loss(-k.norm(dim=-1), received).max()) < 1e-9
    assert float(eviction_loss(k.norm(dim=-1), received).min()) > 10
    chance = torch.rand(received.shape, generator=torch.Generator().manual_seed(0))
    assert 1 < float(eviction_loss(chance, received).min()) < float(eviction_loss(k.norm(dim=-1), received).min())
    with pytest.raises(ValueError, match="one of each per entry"):
        eviction_loss(mass, mass[..., :3])


def test_pocket_norms_tell_attention_in_the_first_layer_only() -> None:
    """Loss by norm over loss by chance: 0.65 in layer 0, 1.38 to 1.63 above. So the method must fail on this model's
    needles, where in the paper's models it is the first layers that disagree."""
    ids, _ = prompts(1024, (0.5,), seed=3)
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids)
    shares = []
    for x in layers:
        received = mass_sums(x.q, x.k, scale=x.scale)
        chance = torch.rand(received.shape, generator=torch.Generator().manual_seed(0))
        loss = eviction_loss(-x.k.norm(dim=-1), received).mean() / eviction_loss(chance, received).mean()
        shares.append(float(loss))
    assert shares[0] < 0.9 and min(shares[1:]) > 1.1


@pytest.mark.parametrize(
    "fields", ["budget=0", "skip_layers=3", "skip_layers=(-1,)", "skip_layers=('a',)", "prune_after=-1", "recent=-1"]
)
def test_fields_are_checked(fields: str) -> None:
    with pytest.raises(ValueError, match=fields.split("=")[0]):
        build(f"l2-norm({fields})")
