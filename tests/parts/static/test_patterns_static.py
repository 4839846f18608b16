"""Static patterns against brute force: their tiles, and what a cache may drop."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.parts.static import CachePlan, Pattern, compile_pattern, group, head_offsets, pow2, since, sink, stride, window

N = 61
PATTERNS: dict[str, Pattern] = {
    "window": window(9),
    "window of blocks": window(3, block=4),
    "window a head": window((1, 20), block=2),
    "sink": sink(5),
    "sink of blocks": sink((0, 2), block=3),
    "stride": stride(5, 2),
    "stride a head": stride(4, (0, 1, 3), block=4),
    "powers": pow2(block=4),
    "powers of tokens": pow2(),
    "group": group(16),
    "shifted group": group(16, (0, 8)),
    "s2": window(3, block=4) | stride(4, (0, 1, 2, 3), block=4),
    "power attention": window(2, block=4) | pow2(block=4) | sink(1, block=4),
    "group and window": group(16, 8) & window(5),
    "stride and window": stride(7) & window(11),
    "powers and stride": pow2() & stride(3, 1),
    "since": since(20),
    "wrapped group": group(16, (0, 8)) | (since(56) & sink((0, 8))),
    "either of two": (sink(2) | window(3)) & (stride(2) | group(8)),
}
every = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def token_map(pattern: Pattern, n: int, causal: bool = True) -> torch.Tensor:
    """`(heads, n, n)`, pair by pair in plain Python arithmetic where it matters: from `allow` on single numbers."""
    i = torch.arange(n)
    pairs = pattern.allow(i.view(1, -1, 1), i.view(1, 1, -1)).expand(-1, n, n)
    return pairs & (i <= i.unsqueeze(1)) if causal else pairs


def tile_map(tokens: torch.Tensor, n_q: int, block_q: int, block_k: int, causal: bool) -> torch.Tensor:
    """The least map that gives all rows of a tile of the last n_q queries whole key tiles."""
    heads, n, _ = tokens.shape
    out = torch.zeros(heads, n_q, n, dtype=torch.bool)
    rows = tokens[:, n - n_q :]
    for q0, k0 in itertools.product(range(0, n_q, block_q), range(0, n, block_k)):
        held = rows[:, q0 : q0 + block_q, k0 : k0 + block_k].flatten(1).any(1)
        out[:, q0 : q0 + block_q, k0 : k0 + block_k] |= held[:, None, None]
    if causal:
        out &= torch.arange(n) <= torch.arange(n - n_q, n).unsqueeze(1)
    return out


def test_atoms_mean_what_they_say() -> None:
    i, j = torch.tensor([[37]]), torch.arange(38).view(1, -1)
    read = {name: PATTERNS[name].allow(i, j) for name in PATTERNS}
    keys = lambda name, head=0: read[name].expand(-1, 38)[head].nonzero().flatten().tolist()  # noqa: E731
    assert keys("window") == list(range(29, 38))
    assert keys("window of blocks") == list(range(28, 38))  # blocks 7, 8, 9
    assert keys("sink") == [0, 1, 2, 3, 4]
    assert keys("stride") == [3, 8, 13, 18, 23, 28, 33]
    assert keys("powers of tokens") == [5, 21, 29, 33, 35, 36, 37]
    assert keys("group") == list(range(32, 38)) and keys("shifted group", 1) == list(range(24, 38))


@every
@pytest.mark.parametrize(("n_q", "block_q", "block_k"), [(N, 8, 8), (N, 5, 12), (23, 8, 4), (N, 1, 1)], ids=str)
def test_tiles_are_those_that_hold_a_pair(pattern: Pattern, n_q: int, block_q: int, block_k: int) -> None:
    compiled = compile_pattern(pattern, n_q, N, block_q=block_q, block_k=block_k)
    tokens = token_map(pattern, N)
    expected = tile_map(tokens, n_q, block_q, block_k, causal=True)
    got = compiled.selection.dense_mask()[0]
    assert torch.equal(got, expected)
    assert compiled.density == pytest.approx(expected.double().mean(0).sum().item() / compiled.selection.visible_pairs())
    if compiled.exact:
        assert torch.equal(got, tokens[:, N - n_q :])
    assert torch.equal(compiled.transpose.dense_mask()[0], expected)


@every
def test_tiles_without_causality(pattern: Pattern) -> None:
    got = compile_pattern(pattern, N, N, block_q=8, block_k=4, causal=False).selection.dense_mask()[0]
    assert torch.equal(got, tile_map(token_map(pattern, N, causal=False), N, 8, 4, causal=False))


def test_block_patterns_are_exact_in_tiles_of_their_blocks() -> None:
    for name in ("window of blocks", "stride a head", "powers", "s2", "power attention"):
        assert compile_pattern(PATTERNS[name], N, N, block_q=4, block_k=4).exact, name
    assert not compile_pattern(PATTERNS["window"], N, N, block_q=4, block_k=4).exact


def test_a_compiled_pattern_is_kept() -> None:
    first = compile_pattern(window(9), N, N, block_q=8, block_k=8)
    assert compile_pattern(window(9), N, N, block_q=8, block_k=8) is first
    assert compile_pattern(window(9), N, N, block_q=8, block_k=4) is not first


@every
def test_what_the_cache_drops_is_never_read_again(pattern: Pattern) -> None:
    """Brute force over all later queries: dropped keys are read by none, and those of an evictable pattern that stay are in view."""
    later = token_map(pattern, 2 * N)
    plan = CachePlan(pattern, pattern.heads)
    for t in range(N):
        kept = plan.keep(torch.arange(t + 1).expand(1, pattern.heads, -1), t)[0]
        read = later[:, t + 1 :, : t + 1].any(1)
        assert not (read & ~kept).any(), f"a key dropped after {t} is read later"
        assert torch.equal(plan.size(t), kept.sum(-1))


@every
def test_evictable_means_once_out_of_view_out_for_good(pattern: Pattern) -> None:
    view = token_map(pattern, 2 * N)
    rows = torch.arange(2 * N)
    # a later row reads a key that an earlier row (at or after the key) did not
    returns = ~view[:, :-1] & view[:, 1:] & (rows[:-1].unsqueeze(1) >= rows)
    assert pattern.evictable == (not bool(returns.any()))


def test_caches_of_windows_sinks_and_strides_stay_small() -> None:
    n = 4096
    assert CachePlan(window(64) | sink(4), 1).size(n - 1).tolist() == [63 + 4]
    assert CachePlan(window(4, block=16) | stride(8, block=16), 1).size(n - 1).item() == 3 * 16 + n // 8  # the next token opens a block
    assert CachePlan(pow2(block=16), 1).size(n - 1).tolist() == [n]
    assert CachePlan(group(64), 1).size(n - 1).tolist() == [0]  # the next token opens a new group


def test_a_group_of_heads_keeps_what_any_of_them_needs() -> None:
    told = CachePlan(window((3, 9, 5, 2)), 2)
    assert told.size(99).tolist() == [8, 4]
    with pytest.raises(ValueError, match="does not fit 3 stored heads"):
        CachePlan(window((3, 9, 5, 2)), 3).size(9)


def test_head_offsets_cover_every_residue() -> None:
    every_block = stride(8, head_offsets(8, 8), block=4).allow(torch.zeros(1, 1).long(), torch.arange(64).view(1, -1))
    assert every_block.any(0).all() and (every_block.sum(0) == 1).all()
    assert head_offsets(8, 4) == (0, 2, 4, 6) and head_offsets(4, 8) == (0, 1, 2, 3, 0, 1, 2, 3)


def test_a_length_of_a_million_needs_no_map() -> None:
    compiled = compile_pattern(window(8, block=128) | sink(1, block=128), 1 << 18, 1 << 18, block_q=128, block_k=128)
    assert compiled.exact and int(compiled.selection.start_counts.max()) == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(0), "window size is 0"), (lambda: stride(4, -1), "stride offset is -1"), (lambda: group(()), "group size is empty"),
        (lambda: window((1, 2)) | sink((1, 2, 3)), "patterns of 2 and 3 heads"), (lambda: stride((2, 3), (0, 1, 2)), "2 and 3 heads"),
        (lambda: compile_pattern(window(1), 5, 4), "queries are among the keys"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern = make()
        assert pattern.heads
