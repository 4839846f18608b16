"""PBS-Attn (pbs-attn, 2510.21270): the claims of the paper, on constructed maps and on the pocket model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.cache.needles import pocket, prompts
from tests.methods.prefill.planted import context, hits, selected
from torch import Tensor

from saccade.attach import capture
from saccade.core import Selection
from saccade.methods import build
from saccade.methods.prefill.pbs_attn import PBSAttention
from saccade.ops import attend
from saccade.parts.permute import permute, segment_order

SMALL = PBSAttention(tau=0.5, block=16, segment=32)


def random_qkv(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, n_q, 16), (2, 2, n_k, 16), (2, 2, n_k, 16))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


# -- the card's evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["head", "group"])
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (300, 320), (77, 300)])
def test_everything_chosen_equals_dense_in_any_order(n_q: int, n_k: int, order: str) -> None:
    """tau = 1 is dense; and the permuted layout with all of its blocks gives the same, in the importance order and in a random one."""
    q, k, v = random_qkv(n_q, n_k)
    method = replace(SMALL, order=order, tau=1.0)
    exact = attend(q.double(), k.double(), v.double()).out
    rounding = (attend(q, k, v).out - exact).abs().max()
    ran: list[Selection | None] = []
    method.attend(context(q, k, v, ran=ran), q, k, v)
    assert ran == [None] and selected(method, q, k, v).density() == 1.0
    whole = n_k // 32 * 32
    rows = torch.arange(n_k - n_q, n_k)[None, None]
    shuffled = permute(k, v, segment_order(torch.rand(2, 6, whole, generator=torch.Generator().manual_seed(1)), 32))
    for moved in (replace(method, tau=0.5)._permute(context(q, k, v), q, k, v), shuffled):
        assert not torch.equal(moved.positions[..., :whole], torch.arange(whole).expand_as(moved.positions[..., :whole]))
        out = attend(q, moved.k, moved.v, q_positions=rows, k_positions=moved.positions).out
        assert (out - exact).abs().max() <= 2 * rounding + 1e-6
        # all blocks, as the method lists them: earlier segments and the own one
        chosen = replace(method, tau=1.0)._choose(context(q, k, v), q, moved)
        out = attend(q, moved.k, moved.v, chosen, q_positions=rows, k_positions=moved.positions).out
        assert (out - exact).abs().max() <= 2 * rounding + 1e-6


def oracle_density(order: Tensor, weight: Tensor, segment: int, block: int, share: float = 0.95) -> float:
    """Pairs of the fewest earlier blocks with `share` of each row block's weight, and of the own segment, among the visible ones."""
    n = weight.shape[-1]
    moved, pairs = weight[order], 0
    for begin in range(0, n, block):
        own = begin // segment * segment
        masses = moved[:own].view(-1, block).sum(-1).sort(descending=True).values
        total = float(masses.sum() + weight[own : begin + block].sum())
        held = float(weight[own : begin + block].sum())
        count = 0
        while held < share * total - 1e-9:
            held += float(masses[count])
            count += 1
        pairs += count * block * block + sum(row - own + 1 for row in range(begin, begin + block))
    return pairs / (n * (n + 1) / 2)


def test_sorting_packs_scattered_heavy_keys() -> None:
    """24 scattered heavy keys among 1024, blocks of 64: the fewest blocks with 95% of the mass are fewer once sorted, not shuffled."""
    n, generator = 1024, torch.Generator().manual_seed(0)
    weight = torch.ones(n, dtype=torch.float64)
    weight[torch.randperm(n, generator=generator)[:24]] = 300.0
    plain = oracle_density(torch.arange(n), weight, 64, 64)
    for segment in (128, 256):
        packed = oracle_density(segment_order(weight[None, None], segment)[0, 0], weight, segment, 64)
        random = [segment_order(torch.rand(1, 1, n, generator=generator), segment)[0, 0] for _ in range(5)]
        shuffled = sum(oracle_density(order, weight, segment, 64) for order in random) / 5
        assert packed < plain - 0.05 and shuffled > plain - 0.02, (segment, packed, plain, shuffled)


def test_a_permutation_across_segments_would_see_the_future() -> None:
    """Without positions, keys moved across segments reach earlier rows; the layout with positions stays causal whatever the order."""
    q, k, v = random_qkv(128, 128)
    other = v.clone()
    other[:, :, 90:] = 7.0
    across = torch.randperm(128, generator=torch.Generator().manual_seed(0)).expand(2, 2, 128)
    rows = torch.arange(128)[None, None]
    plain, honest = [], []
    for values in (v, other):
        moved = permute(k, values, across)
        plain.append(attend(q, moved.k, moved.v).out)
        honest.append(attend(q, moved.k, moved.v, q_positions=rows, k_positions=moved.positions).out)
    assert not torch.equal(plain[0][:, :, :90], plain[1][:, :, :90])
    assert torch.equal(honest[0][:, :, :90], honest[1][:, :, :90])
    a, b = (SMALL.attend(context(q, k, x), q, k, x) for x in (v, other))
    assert torch.equal(a[:, :, :90], b[:, :, :90]) and not torch.equal(a[:, :, 90:], b[:, :, 90:])


# -- the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["head", "group"])
@pytest.mark.parametrize(("n_q", "n_k"), [(150, 150), (83, 150), (21, 150)])
def test_what_is_read_is_the_equation(n_q: int, n_k: int, order: str) -> None:
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    q = 2 * q
    found = selected(replace(SMALL, order=order), q, k, v).dense_mask()
    wide = k.repeat_interleave(3, 1)
    p = (q[:, :, -16:] @ wide[:, :, :128].mT * 0.25).softmax(-1).mean(2)
    if order == "group":
        p = p.unflatten(1, (2, 3)).mean(2).repeat_interleave(3, 1)
    place = torch.cat([segment_order(p, 32), torch.arange(128, 150).expand(2, 6, -1)], -1)
    sorted_k = torch.gather(wide, 2, place.unsqueeze(-1).expand(*place.shape, 16))
    for begin in range(0, n_q, 16):
        rows = torch.arange(begin, min(begin + 16, n_q))
        own = (int(rows[0]) + n_k - n_q) // 32 * 32
        for b in range(2):
            for h in range(6):
                wanted = set(range(own, n_k))
                means = sorted_k[b, h, :own].view(-1, 16, 16).mean(1)
                weights = (means @ q[b, h, rows].mean(0) * 0.25).softmax(0)
                held = 0.0
                for block in weights.argsort(descending=True).tolist():
                    if held >= 0.5:
                        break
                    held += float(weights[block])
                    wanted |= set(place[b, h, block * 16 : block * 16 + 16].tolist())
                if own:
                    first = int((place[b, h] == 0).nonzero()) // 16
                    wanted |= set(place[b, h, first * 16 : first * 16 + 16].tolist())
                for row in rows.tolist():
                    assert set(found[b, h, row].nonzero().flatten().tolist()) == {j for j in wanted if j <= row + n_k - n_q}


@pytest.mark.parametrize("order", ["head", "group"])
@pytest.mark.parametrize(("n_q", "n_k"), [(300, 300), (90, 300)])
def test_permuted_layout_gives_attention_over_the_selection(n_q: int, n_k: int, order: str) -> None:
    q, k, v = random_qkv(n_q, n_k, torch.float64)
    method = replace(SMALL, order=order)
    ran: list[Selection | None] = []
    out = method.attend(context(q, k, v, ran=ran), q, k, v)
    found = selected(method, q, k, v)
    assert (out - attend(q, k, v, found, impl="reference").out).abs().max() < 1e-12
    assert found.density() < 0.9 and len(ran) == 1 and ran[0] is not None
    # pairs by the places of the layout are the pairs by position: a segment holds its own keys in any order
    if n_q == n_k:
        assert torch.equal(ran[0].pairs().expand(2, 6), found.pairs())


def test_variant_chooses_by_antidiagonals() -> None:
    """One query and one key match, another query is the opposite: the mean of the queries forgets both, the variant does not."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 512, 32, generator=generator)
    q = 0.3 * torch.randn(1, 1, 512, 32, generator=generator)
    # sorting puts the key first in its segment, where the last query of a square of 4 meets it
    q[..., 503, :] = 12 * k[..., 137, :]
    q[..., 499, :] = -12 * k[..., 137, :]
    method = PBSAttention(tau=0.3, block=32, segment=64)
    variant = replace(method, scores="antidiagonal", stride=4)
    found = [selected(m, q, k, k) for m in (method, variant)]
    assert [bool(s.coverage()[0, 0, -1, 137]) for s in found] == [False, True]
    with pytest.raises(ValueError, match=r"^pbs-attn\(stride=5\) does not divide block=32$"):
        replace(method, scores="antidiagonal", stride=5)


def test_each_query_head_has_its_own_order() -> None:
    q, k, v = random_qkv(200, 200)
    own = SMALL._permute(context(q, k, v), q, k, v)
    assert own.k.shape == (2, 6, 200, 16) and not torch.equal(own.positions[:, 0], own.positions[:, 1])
    shared = replace(SMALL, order="group")._permute(context(q, k, v), q, k, v)
    assert shared.k.shape == (2, 2, 200, 16)
    assert torch.equal(own.positions[..., 192:], torch.arange(192, 200).expand(2, 6, 8))
    for head in range(6):
        gathered = k[:, head // 3].gather(1, own.positions[:, head].unsqueeze(-1).expand(-1, -1, 16))
        assert torch.equal(own.k[:, head], gathered)


def test_short_prompts_and_decoding_are_dense() -> None:
    for n_q, n_k in ((1, 300), (32, 32)):
        q, k, v = random_qkv(n_q, n_k)
        ran: list[Selection | None] = []
        SMALL.attend(context(q, k, v, ran=ran), q, k, v)
        assert ran == [None]


@pytest.mark.parametrize(("field", "value"), [
    ("tau", 0.0), ("tau", 1.5), ("tau", True), ("block", 0), ("segment", 100), ("segment", 1.0), ("order", "row"),
    ("scores", "max"), ("stride", 0),
])  # fmt: skip
def test_wrong_fields_are_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^pbs-attn\({field}=") as caught:
        PBSAttention(**{field: value})
    assert "\n" not in str(caught.value)


def test_spec_round_trip() -> None:
    assert build("pbs-attn(tau=0.8)").spec == "pbs-attn(tau=0.8)" and build("pbs-attn") == PBSAttention()


# -- the pocket model ----------------------------------------------------------------------------------------------------


def test_sorted_keys_hold_more_mass_per_block() -> None:
    """On a retrieving layer, the same number of blocks covers more attention of the last rows than without sorting."""
    ids, _ = prompts(2047, (0.4,))
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids, use_cache=False)
    q, k = layers[5].q, layers[5].k
    n, block = q.shape[2], 64
    p = (q[:, :, -64:] @ k.repeat_interleave(3, 1).mT * layers[5].scale)
    p = p.masked_fill(torch.arange(n) > torch.arange(n - 64, n)[:, None], -torch.inf).softmax(-1).mean(2)[..., : n - 256]
    sorted_p = p.gather(-1, segment_order(p, 256))
    top = [x.unflatten(-1, (-1, block)).sum(-1).sort(-1, descending=True).values[..., :4].sum(-1).mean() for x in (p, sorted_p)]
    assert top[1] > 1.02 * top[0], top


def test_needles_are_found() -> None:
    ids, answers = prompts(1087, (0.3, 0.7))
    found, density = hits(ids, answers, "pbs-attn(tau=0.8, block=32, segment=128, scores='antidiagonal', stride=4)")
    assert found == 2 and density < 0.75
