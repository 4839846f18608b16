"""Lists that name most of a cache: read under a mask, with the results of gathering and no more than that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from saccade.core import Selection
from saccade.ops import decode
from saccade.ops.decode import masked
from saccade.ops.decode.listed import Ends, Listed
from tests.ops.test_decode import Case, cases, exactly, problem_of


@pytest.fixture(scope="module", autouse=True)
def small_caches_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "LEAST", 0)
        yield


def case_of(seed: int, share: float, heads: int, *, tail: int = 0, weighted: bool = False, n: int = 90) -> Case:
    """Single keys by chance, of 6 query heads over 2 key heads, and the last `tail` keys as one tile."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, m, 16, generator=g) for h, m in ((6, 1), (2, n), (2, n)))
    keep = torch.rand(2, heads, 1, n - tail, generator=g) < share
    longest = int(keep.sum(-1).max())
    ids = torch.where(keep, torch.arange(n - tail), n).sort(-1).values[..., :longest].to(torch.int32)
    starts = torch.full((2, heads, 1, 1 if tail else 0), n - tail, dtype=torch.int32)
    s = Selection(
        n_q=1, n_k=n, block_q=1, block_k=tail or 1, starts=starts, start_counts=(starts < n).sum(-1, dtype=torch.int32), tokens=ids,
        token_counts=(ids < n).sum(-1, dtype=torch.int32), log_weight=torch.randn(ids.shape, generator=g) if weighted else None,
    )  # fmt: skip
    return Case(q, k, v, s, None)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("tail", [0, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_reference(heads: int, tail: int, weighted: bool) -> None:
    case = case_of(heads, 0.9, heads, tail=tail, weighted=weighted)
    assert masked.takes(problem_of(case), Ends.of(case.selection))
    want = exactly(case)
    got = decode(*case[:4], return_lse=True)
    assert float((got.out - want.out).abs().max()) < 1e-6
    assert float((got.lse - want.lse).abs().max()) < 2e-6


@settings(max_examples=60, deadline=None)
@given(cases(torch.float64))
def test_any_case_equals_the_reference(case: Case) -> None:
    want, got = exactly(case), decode(*case[:4], softcap=case.softcap, return_lse=True)
    assert float((got.out - want.out).abs().max()) < 1e-12
    there = want.lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, there) and bool((got.out[~there] == 0).all())
    assert not bool(there.any()) or float((got.lse - want.lse)[there].abs().max()) < 1e-12


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_listed_stays_out(which: str, bad: float) -> None:
    case = case_of(3, 0.85, 2)
    assert masked.takes(problem_of(case), Ends.of(case.selection))
    want = decode(*case[:4]).out
    unread = ~case.selection.expand(2, 2).dense_mask()[:, :, 0]
    (case.k if which == "k" else case.v)[unread] = bad
    got = decode(*case[:4]).out
    assert float((got - want).abs().max()) < 1e-6


def test_an_empty_list_gives_zero() -> None:
    case = case_of(4, 1.0, 6)
    s = case.selection
    s.tokens[1, 2], s.token_counts[1, 2] = s.n_k, 0
    got = decode(*case[:4], return_lse=True)
    assert bool((got.out[1, 2] == 0).all()) and bool((got.lse[1, 2] == -torch.inf).all())
    assert float((got.out - exactly(case).out).abs().max()) < 1e-6


def test_who_takes_it() -> None:
    def takes(case: Case) -> bool:
        return masked.takes(problem_of(case), Ends.of(case.selection))

    # a list of a group is gathered once, those of its three heads are three
    assert takes(case_of(0, 0.3, 6)) and not takes(case_of(0, 0.3, 2)) and takes(case_of(0, 0.9, 2))
    case = case_of(0, 0.9, 2)
    assert not takes(case._replace(softcap=3.0))
    assert not takes(case._replace(**{name: getattr(case, name).bfloat16() for name in "qkv"}))
    assert not takes(case._replace(v=case.v[..., :8]))
    assert not takes(case._replace(q=case.q.requires_grad_()))
    # one long list among short ones is padding, not work
    lonely = case_of(0, 1.0, 6)
    lonely.selection.tokens[:, 1:, :, 3:], lonely.selection.token_counts[:, 1:] = 90, 3
    assert not takes(lonely)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_tile_beside_many_keys_is_read_as_single_keys(weighted: bool, ragged: bool) -> None:
    case = case_of(5, 0.3, 2, tail=7, weighted=weighted)
    s: Selection = case.selection
    if not ragged:
        least = int(s.token_counts.min())
        cut: dict[str, Tensor | None] = {"tokens": s.tokens[..., :least], "token_counts": s.token_counts.clamp(max=least)}
        cut["log_weight"] = None if s.log_weight is None else s.log_weight[..., :least]
        s = Selection(**{**vars(s), **cut})
    listed = Listed.of(s, 2, 2, Ends.of(s))
    assert listed.starts.shape[-1] == 0 and (listed.gaps is not None) == ragged
    case = case._replace(selection=s)
    assert not masked.takes(problem_of(case), Ends.of(s))
    want, got = exactly(case), decode(*case[:4], return_lse=True)
    assert float((got.out - want.out).abs().max()) < 1e-6 and float((got.lse - want.lse).abs().max()) < 2e-6
    if ragged:
        case.v[:, :, -1] = torch.nan  # read by the tile, and by what stands past the end of a short list
        assert bool(decode(*case[:4]).out.isnan().all())
