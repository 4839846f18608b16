"""Selection: what it means, its algebra and its other forms, against dense masks written out with loops."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from saccade.core import Selection
from tests.core.cases import Case, OneList, by_rows, cases, few, make_case, make_one_list, one_lists, sizes, visible, weight_of

shapes = st.shared(sizes(), key="shape")
pairs_of_cases = st.tuples(shapes.flatmap(lambda s: cases(s)), shapes.flatmap(lambda s: cases(s)))


# -- meaning -----------------------------------------------------------------------------------------------------------------


@few
@given(cases())
def test_lists_in_any_order_mean_their_union(case: Case) -> None:
    assert torch.equal(case.selection.dense_mask(), case.mask)


@few
@given(cases(weighted=True))
def test_weights_stay_with_their_keys(case: Case) -> None:
    assert torch.equal(case.selection.dense_mask(), case.mask)
    assert torch.equal(weight_of(case.selection), case.weight)


@few
@given(cases())
def test_lists_are_sorted_disjoint_and_filled_up(case: Case) -> None:
    s = case.selection
    for ids, counts in ((s.starts, s.start_counts), (s.tokens, s.token_counts)):
        assert ids.dtype == torch.int32 and counts.shape == ids.shape[:3]
        real = torch.arange(ids.shape[-1]) < counts.unsqueeze(-1)
        assert bool((ids[~real] == s.n_k).all())
        assert bool(((ids >= 0) & (ids < s.n_k))[real].all())
        rising = ids[..., 1:] > ids[..., :-1]
        assert bool(rising[real[..., 1:]].all())
    tiles = Selection.from_parts(n_q=s.n_q, n_k=s.n_k, block_q=s.block_q, block_k=s.block_k, starts=s.starts, causal=False)
    in_tiles = tiles.coverage()
    singles = Selection.from_parts(n_q=s.n_q, n_k=s.n_k, block_q=s.block_q, tokens=s.tokens, causal=False).coverage()
    assert not bool((in_tiles & singles).any())
    assert s.aligned == bool((s.starts[s.starts < s.n_k] % s.block_k == 0).all())


@few
@given(cases())
def test_pairs_and_density_count_the_mask(case: Case) -> None:
    s, whole = case.selection, visible(case.selection.n_q, case.selection.n_k, case.selection.causal)
    assert torch.equal(s.pairs().expand(case.mask.shape[:2]), case.mask.sum((-1, -2)))
    assert s.visible_pairs() == int(whole.sum())
    seen = max(int(whole.sum()), 1)
    assert s.density() == pytest.approx(float(case.mask.sum((-1, -2)).double().mean()) / seen)
    assert torch.allclose(s.density_by_head().expand(case.mask.shape[:2]), case.mask.sum((-1, -2)).double() / seen)
    assert 0 <= s.density() <= 1


def test_tiles_and_tokens_may_differ_in_batch_and_heads() -> None:
    starts = torch.tensor([0, 4]).view(1, 1, 1, 2)
    tokens = torch.tensor([[1, 9], [5, 7]]).view(2, 1, 1, 2).expand(2, 3, 1, 2)
    for weight in (None, torch.randn(2, 3, 1, 2)):
        s = Selection.from_parts(
            n_q=1, n_k=12, block_q=1, block_k=3, starts=starts, tokens=tokens, log_weight=weight, causal=False
        )
        expected = torch.zeros(2, 3, 1, 12, dtype=torch.bool)
        expected[..., [0, 1, 2, 4, 5, 6]] = True
        expected[0, ..., 9] = expected[1, ..., 7] = True
        assert torch.equal(s.dense_mask(), expected) and (s.batch, s.heads) == (2, 3)
        assert torch.equal(s.pairs(), torch.full((2, 3), 7))
    shared = Selection.from_parts(
        n_q=1, n_k=12, block_q=1, block_k=3, starts=starts.expand(2, 3, 1, 2), tokens=tokens[:1, :1],
        log_weight=torch.tensor([5.0, 6.0]).view(1, 1, 1, 2), causal=False,
    )  # fmt: skip
    assert weight_of(shared)[1, 2, 0, 9] == 6 and weight_of(shared).sum() == 36


# -- one token list for all query tiles --------------------------------------------------------------------------------------


@few
@given(one_lists())
def test_a_shared_list_means_what_the_written_lists_mean(both: OneList) -> None:
    a, b = both.shared, both.written
    assert a.tokens.shape[2] == 1 and a.token_counts.shape == a.start_counts.shape
    assert torch.equal(a.coverage(), b.coverage()) and torch.equal(a.dense_mask(), b.dense_mask())
    assert torch.equal(weight_of(a), weight_of(b))
    assert torch.equal(a.pairs(), b.pairs()) and torch.equal(a.pairs(), a.dense_mask().sum((-1, -2)))
    assert a.density() == b.density() and torch.equal(a.density_by_head(), b.density_by_head())
    turned, back = a.transpose(), b.transpose()
    assert torch.equal(turned.dense_mask(), back.dense_mask())
    if turned.block_k == back.block_k:  # a list with room for tokens, and none in it, is turned key by key
        assert torch.equal(turned.counts.sum((-1, -2)), back.counts.sum((-1, -2)))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(a.batch, h, n, 4, generator=generator) for h, n in ((2 * a.heads, a.n_q), (a.heads, a.n_k)))
    assert torch.equal(a.mass(q, k), b.mass(q, k))


@few
@given(one_lists())
def test_shared_lists_are_written_out_on_demand(both: OneList) -> None:
    a, b = both.shared, both.written
    longest = b.tokens.shape[-1]
    own = a.own_lists()
    assert own.tokens.shape[2] == a.tiles and own.own_lists() is own
    assert torch.equal(own.tokens[..., :longest], b.tokens) and bool((own.tokens[..., longest:] == a.n_k).all())
    if own.log_weight is not None and b.log_weight is not None:
        assert torch.equal(own.log_weight[..., :longest][b.tokens < a.n_k], b.log_weight[b.tokens < a.n_k])
    last, some = slice(-2, None), torch.arange(a.tiles).flip(0)
    for s in (a, own):
        assert torch.equal(s.tokens_of(last), own.tokens[:, :, last]) and torch.equal(s.tokens_of(some), own.tokens[:, :, some])
    grown = a.expand(2 * a.batch if a.batch == 1 else a.batch, 2 * a.heads)
    assert grown.tokens.shape[2] == 1 and torch.equal(grown.dense_mask()[:1, ::2], b.dense_mask()[:1])


@few
@given(shapes.flatmap(lambda s: st.tuples(one_lists(s, weighted=False), cases(s), one_lists(s))), st.integers(0, 6), st.integers(0, 6))
def test_shared_lists_are_combined_as_written_ones(three: tuple[OneList, Case, OneList], sinks: int, local: int) -> None:
    first, case, other = three
    assume(case.selection.batch == first.shared.batch)
    for combine in (operator.or_, operator.and_):
        got, want = combine(first.shared, case.selection), combine(first.written, case.selection)
        assert torch.equal(got.dense_mask(), want.dense_mask())
    got, want = (s.with_forced(sinks, local) for s in (other.shared, other.written))
    assert torch.equal(got.dense_mask(), want.dense_mask()) and torch.equal(weight_of(got), weight_of(want))


def test_a_shared_list_has_a_flex_form() -> None:
    both = make_one_list(n_q=13, n_k=17, causal=True, block_q=3, block_k=4, batch=2, heads=2, weighted=False, seed=3)
    mask = both.shared.to_flex(2, 4)
    assert bool(both.shared.token_counts.any())
    dense = create_mask(mask.mask_mod, 2, 4, 13, 17, device="cpu")
    assert torch.equal(dense, both.written.dense_mask().repeat_interleave(2, dim=1))


# -- algebra -----------------------------------------------------------------------------------------------------------------


@few
@given(pairs_of_cases)
def test_union_and_intersection_are_those_of_the_masks(both: tuple[Case, Case]) -> None:
    a, b = both
    for union in (a.selection | b.selection, b.selection | a.selection):
        assert torch.equal(*torch.broadcast_tensors(union.dense_mask(), _over(a, b, torch.logical_or)))
    for both_read in (a.selection & b.selection, b.selection & a.selection):
        assert torch.equal(*torch.broadcast_tensors(both_read.dense_mask(), _over(a, b, torch.logical_and)))


def _over(a: Case, b: Case, combine: Callable[..., torch.Tensor]) -> torch.Tensor:
    heads = math.lcm(a.mask.shape[1], b.mask.shape[1])
    return combine(*(c.mask.repeat_interleave(heads // c.mask.shape[1], dim=1) for c in (a, b)))


@few
@given(shapes.flatmap(lambda s: st.tuples(cases(s, weighted=True), cases(s))))
def test_weights_survive_being_combined(both: tuple[Case, Case]) -> None:
    """A key that one operand lists plainly has weight 0 in a union; in an intersection the weight of a single key stays."""
    a, b = both
    heads = math.lcm(a.mask.shape[1], b.mask.shape[1])
    weight = a.weight.repeat_interleave(heads // a.mask.shape[1], dim=1)
    own, other = (c.mask.repeat_interleave(heads // c.mask.shape[1], dim=1) for c in (a, b))
    for union in (a.selection | b.selection, b.selection | a.selection):
        expected = torch.where(own & ~other, weight, 0.0)
        assert torch.equal(*torch.broadcast_tensors(weight_of(union) * union.dense_mask(), expected))
    for both_read in (a.selection & b.selection, b.selection & a.selection):
        expected = torch.where(own & other, weight, 0.0)
        assert torch.equal(*torch.broadcast_tensors(weight_of(both_read) * both_read.dense_mask(), expected))


@few
@given(cases(weighted=True))
def test_a_weighted_selection_combined_with_itself_is_itself(case: Case) -> None:
    s = case.selection
    for combined in (s | s, s & s):
        assert torch.equal(combined.dense_mask(), case.mask)
        assert torch.equal(weight_of(combined) * case.mask, case.weight * case.mask)


def test_two_different_weights_of_a_key_are_refused() -> None:
    tokens = torch.tensor([1, 3]).view(1, 1, 1, 2)
    a, b = (
        Selection.from_positions(tokens, n_q=1, n_k=5, log_weight=torch.tensor(w).view(1, 1, 1, 2), causal=False)
        for w in ([0.5, 1.0], [0.5, 2.0])
    )
    for combine in (lambda: a | b, lambda: a & b):
        with pytest.raises(ValueError, match="two different log weights"):
            combine()


@few
@given(cases(), st.integers(0, 6), st.integers(0, 6))
def test_forced_keys_are_added(case: Case, sinks: int, local: int) -> None:
    s = case.selection
    expected = case.mask.clone()
    for row in range(s.n_q):
        tile = row // s.block_q
        first = tile * s.block_q + s.offset
        last = min((tile + 1) * s.block_q, s.n_q) + s.offset
        for key in range(s.n_k):
            forced = key < sinks or (local > 0 and first - local < key < last)
            if forced and (not s.causal or key <= row + s.offset):
                expected[:, :, row, key] = True
    got = s.with_forced(sinks=sinks, local=local)
    assert torch.equal(*torch.broadcast_tensors(got.dense_mask(), expected))
    if local and s.causal:
        own = torch.arange(s.n_q) + s.offset
        there = own >= 0
        assert bool(got.dense_mask()[:, :, torch.arange(s.n_q)[there], own[there]].all())


def test_what_cannot_be_combined_is_refused() -> None:
    a = Selection.full(4, 8)
    for b in (Selection.full(4, 9), Selection.full(5, 8), Selection.full(4, 8, causal=False)):
        with pytest.raises(ValueError, match="cannot be combined"):
            a | b
    two, three = (
        Selection.from_positions(torch.zeros(n, 1, 4, 1, dtype=torch.int64), n_q=4, n_k=8) for n in (2, 3)
    )
    with pytest.raises(ValueError, match="does not fit batch 3"):
        two & three
    with pytest.raises(ValueError, match="at least 0"):
        a.with_forced(sinks=-1)


# -- other forms -------------------------------------------------------------------------------------------------------------


@few
@given(cases())
def test_the_transposed_lists_mean_the_same(case: Case) -> None:
    s = case.selection
    by_key = s.transpose()
    assert torch.equal(by_key.dense_mask(), s.dense_mask())
    real = torch.arange(by_key.query_tiles.shape[-1]) < by_key.counts.unsqueeze(-1)
    assert bool((by_key.query_tiles[~real] == s.tiles).all())
    assert bool((by_key.query_tiles[..., 1:] > by_key.query_tiles[..., :-1])[real[..., 1:]].all())
    assert by_key.query_tiles.shape[2] == math.ceil(s.n_k / by_key.block_k)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_the_flex_mask_means_the_same(case: Case) -> None:
    s = case.selection
    heads = s.heads * 2  # lists shared by a group
    mask = s.to_flex(s.batch, heads)
    dense = create_mask(mask.mask_mod, s.batch, heads, s.n_q, s.n_k, device="cpu")
    assert torch.equal(dense, case.mask.repeat_interleave(2, dim=1))
    assert torch.equal(mask.to_dense().flatten(2).bool().any(-1), case.mask.repeat_interleave(2, dim=1).flatten(2).any(-1))


def test_the_flex_mask_of_several_blocks() -> None:
    s = Selection.window(300, 400, 70, sinks=5, block_q=32, block_k=64)
    mask = s.to_flex(1, 2)
    assert torch.equal(create_mask(mask.mask_mod, 1, 2, 300, 400, device="cpu"), s.dense_mask().expand(1, 2, -1, -1))
    padded = torch.nn.functional.pad(s.dense_mask(), (0, -400 % 128, 0, -300 % 128)).unflatten(3, (-1, 128)).unflatten(2, (-1, 128))
    assert torch.equal(mask.to_dense().bool(), padded.any(-1).any(-2).expand(1, 2, -1, -1))


def test_weights_have_no_flex_form() -> None:
    case = make_case(
        n_q=2, n_k=3, causal=False, block_q=1, block_k=1, batch=1, heads=1, aligned=True, with_tiles=False, with_tokens=True,
        weighted=True, seed=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="log weights"):
        case.selection.to_flex(1, 1)


@few
@given(cases(batch=2), st.sampled_from([1, 2]), st.integers(0, 10**6), st.sampled_from([None, 0.7]))
def test_mass_is_the_share_of_the_softmax(case: Case, group: int, seed: int, scale: float | None) -> None:
    s = case.selection
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, s.heads * group, s.n_q, 6, generator=generator)
    k = torch.randn(2, s.heads, s.n_k, 6, generator=generator)
    logits = (q.double() @ k.double().repeat_interleave(group, 1).mT) * (6**-0.5 if scale is None else scale)
    sees = visible(s.n_q, s.n_k, s.causal)
    weights = torch.softmax(logits.masked_fill(~sees, -torch.inf), -1)
    share = (weights * case.mask.repeat_interleave(group, 1)).sum(-1)
    share = torch.where(sees.any(-1), share, 1.0)  # a row that sees nothing has lost nothing
    assert torch.allclose(s.mass(q, k, scale), share.mean(-1).float(), atol=1e-5)


# -- constructors ------------------------------------------------------------------------------------------------------------


@few
@given(sizes(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_a_block_mask_comes_back(shape: dict, block_q: int, block_k: int, seed: int) -> None:
    n_q, n_k, causal = shape["n_q"], shape["n_k"], shape["causal"]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 3, math.ceil(n_q / block_q), math.ceil(n_k / block_k), generator=generator) < 0.5
    s = Selection.from_block_mask(mask, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)
    keys = torch.stack([mask[..., key // block_k] for key in range(n_k)], -1)
    assert torch.equal(s.dense_mask(), by_rows(keys, block_q, n_q) & visible(n_q, n_k, causal))
    assert s.aligned and s.tokens.shape[-1] == 0


@few
@given(sizes(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.floats(0.1, 1.0))
def test_a_token_mask_comes_back(shape: dict, block_q: int, block_k: int, seed: int, filled: float) -> None:
    n_q, n_k, causal = shape["n_q"], shape["n_k"], shape["causal"]
    mask = torch.rand(2, 3, math.ceil(n_q / block_q), n_k, generator=torch.Generator().manual_seed(seed)) < filled
    s = Selection.from_token_mask(mask, block_q=block_q, n_q=n_q, block_k=block_k, causal=causal)
    assert torch.equal(s.dense_mask(), by_rows(mask, block_q, n_q) & visible(n_q, n_k, causal))
    again = Selection.from_token_mask(s.coverage(), block_q=block_q, n_q=n_q, block_k=block_k, causal=causal)
    assert torch.equal(again.starts, s.starts) and torch.equal(again.tokens, s.tokens)


@few
@given(sizes(), st.integers(1, 6), st.integers(0, 10**6))
def test_positions_in_any_order_come_back(shape: dict, block_q: int, seed: int) -> None:
    n_q, n_k, causal = shape["n_q"], shape["n_k"], shape["causal"]
    generator = torch.Generator().manual_seed(seed)
    lead = (1, 2, math.ceil(n_q / block_q))
    tokens = torch.randint(0, n_k, (*lead, 4), generator=generator)
    counts = torch.randint(0, 5, lead, generator=generator)
    s = Selection.from_positions(tokens, n_q=n_q, n_k=n_k, block_q=block_q, counts=counts, causal=causal)
    listed = torch.nn.functional.one_hot(tokens, n_k).bool() & (torch.arange(4) < counts.unsqueeze(-1)).unsqueeze(-1)
    assert torch.equal(s.dense_mask(), by_rows(listed.any(-2), block_q, n_q) & visible(n_q, n_k, causal))


@few
@given(sizes(), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 4))
def test_full_and_window(shape: dict, block_q: int, block_k: int, size: int, sinks: int) -> None:
    n_q, n_k, causal = shape["n_q"], shape["n_k"], shape["causal"]
    sees = visible(n_q, n_k, causal)
    full = Selection.full(n_q, n_k, block_q=block_q, block_k=block_k, causal=causal)
    assert torch.equal(full.dense_mask()[0, 0], sees)
    assert full.density() == (1.0 if sees.any() else 0.0)
    window = Selection.window(n_q, n_k, size, sinks=sinks, block_q=block_q, block_k=block_k, causal=causal)
    exact = Selection.window(n_q, n_k, size, sinks=sinks, block_q=1, block_k=1, causal=causal)
    rows, keys = torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k)
    wanted = ((keys > rows - size) & (keys <= rows) | (keys < sinks)) & sees
    assert torch.equal(exact.dense_mask()[0, 0], wanted)
    assert not bool((wanted & ~window.dense_mask()[0, 0]).any())  # a tile reads what any of its rows needs
    reach = keys > rows - size - (block_q - 1)
    assert not bool((window.dense_mask()[0, 0] & ~(reach | (keys < sinks))).any())


def test_empty_sides_are_selections_too() -> None:
    for n_q, n_k in ((0, 5), (5, 0), (0, 0)):
        s = Selection.full(n_q, n_k, block_q=2, block_k=2)
        assert s.dense_mask().shape == (1, 1, n_q, n_k) and s.density() == 0 and s.visible_pairs() == 0
        assert s.transpose().dense_mask().shape == (1, 1, n_q, n_k)


@few
@given(cases(), st.integers(1, 3))
def test_expanding_repeats_over_groups(case: Case, group: int) -> None:
    s = case.selection
    assume(s.batch == 1)
    wide = s.expand(3, s.heads * group)
    assert torch.equal(wide.dense_mask(), case.mask.repeat_interleave(group, 1).expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="does not fit"):
        wide.expand(2, wide.heads)


def test_wrong_lists_are_refused() -> None:
    ids = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected .*1, M"):
        Selection.from_parts(n_q=4, n_k=8, block_q=4, tokens=ids)
    with pytest.raises(ValueError, match="none was given"):
        Selection.from_parts(n_q=4, n_k=8, block_q=2)
    with pytest.raises(ValueError, match="overlap"):
        Selection.from_parts(n_q=2, n_k=8, block_q=2, block_k=3, starts=torch.tensor([0, 2]).view(1, 1, 1, 2))
    with pytest.raises(ValueError, match="shape of tokens"):
        Selection.from_parts(n_q=4, n_k=8, block_q=2, tokens=ids, log_weight=torch.zeros(1))
    with pytest.raises(ValueError, match="must be positive"):
        Selection.from_parts(n_q=4, n_k=8, block_q=0, tokens=ids)
    with pytest.raises(ValueError, match="block mask"):
        Selection.from_block_mask(torch.ones(1, 1, 2, 2), block_q=2, block_k=4, n_q=4, n_k=8)
    with pytest.raises(ValueError, match="token mask"):
        Selection.from_token_mask(torch.ones(1, 1, 3, 8, dtype=torch.bool), block_q=2, n_q=4)
    with pytest.raises(ValueError, match="window of 0"):
        Selection.window(4, 8, 0)
