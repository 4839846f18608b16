"""KeptKeys: a ragged store of chosen keys against plain lists of them."""

from __future__ import annotations

import pytest
import torch

from saccade.cache.kept_keys import KeptKeys
from saccade.core.storage import read, write

B, H, D, DV = 2, 3, 4, 6


def drawn(m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(B, H, m, d, generator=g, dtype=torch.float64) for d in (D, DV))
    return k, v, torch.rand(B, H, m, generator=g) < 0.4, torch.randn(B, H, m, generator=g)


def filled() -> tuple[KeptKeys, dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, float]]]]:
    """A store of three additions, and the same as lists."""
    lists: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, float]]] = {(b, h): [] for b in range(B) for h in range(H)}
    k, v, _, _ = drawn(1, 0)
    store = KeptKeys.none(k, v)
    for seed, m in ((1, 7), (2, 1), (3, 5)):
        k, v, chosen, score = drawn(m, seed)
        chosen[0, 1] = False
        store = store.add(k, v, chosen, score=score)
        for b, h, j in chosen.nonzero().tolist():
            lists[b, h].append((k[b, h, j], v[b, h, j], float(score[b, h, j])))
    return store, lists


def check(store: KeptKeys, lists: dict, rows: list[int] | None = None) -> None:
    pairs = [(b, h) for b in (range(B) if rows is None else rows) for h in range(H)]
    assert store.counts.flatten().tolist() == [len(lists[pair]) for pair in pairs]
    flat = [entry for pair in pairs for entry in lists[pair]]
    assert torch.equal(store.keys, torch.stack([k for k, _, _ in flat])) and torch.equal(store.values, torch.stack([v for _, v, _ in flat]))
    assert store.side["score"].tolist() == pytest.approx([s for _, _, s in flat])


def test_additions_come_behind_those_of_their_pair():
    store, lists = filled()
    check(store, lists)
    held = store.rectangle()
    for (b, h), entries in lists.items():
        assert held.valid[b, h].tolist() == [j < len(entries) for j in range(held.valid.shape[2])]
        for j, (k, v, score) in enumerate(entries):
            assert torch.equal(held.keys[b, h, j], k) and torch.equal(held.values[b, h, j], v)
            assert float(held.side["score"][b, h, j]) == pytest.approx(score)


def test_bytes_are_those_of_the_entries_and_nothing_else():
    store, lists = filled()
    total = sum(map(len, lists.values()))
    assert store.nbytes == total * (8 * (D + DV) + 4) + 8 * B * H
    less = store.best("score", 2)
    kept = sum(min(len(entries), 2) for entries in lists.values())
    assert less.nbytes == kept * (8 * (D + DV) + 4) + 8 * B * H < store.nbytes


def test_the_best_stay_in_their_order_and_of_equal_ones_the_older():
    store, lists = filled()
    for most in (0, 1, 3, 50):
        shorter = {}
        for pair, entries in lists.items():
            order = sorted(range(len(entries)), key=lambda j, e=entries: (-e[j][2], j))[:most]
            shorter[pair] = [entries[j] for j in sorted(order)]
        if most:
            check(store.best("score", most), shorter)
        else:
            assert store.best("score", 0).keys.shape == (0, D)
    k, v, _, _ = drawn(6, 9)
    same = KeptKeys.none(k, v).add(k, v, torch.ones(B, H, 6, dtype=torch.bool), score=torch.ones(B, H, 6))
    assert torch.equal(same.best("score", 4).rectangle().keys, k[:, :, :4])


@pytest.mark.parametrize("n", [1, 5])
def test_attention_is_that_over_the_entries_of_each_pair(n: int):
    store, lists = filled()
    q = torch.randn(B, 2 * H, n, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for given, side in ((store, False), (store.add(*drawn(1, 0)[:2], torch.zeros(B, H, 1, dtype=torch.bool)), False), (store, True)):
        if side:
            given = KeptKeys(given.keys, given.values, {"log_weight": given.side["score"].double()}, given.counts)
        part = given.attend(q)
        assert part.lse is not None
        for (b, h), entries in lists.items():
            for head in (2 * h, 2 * h + 1):
                if not entries:
                    assert not part.out[b, head].any() and bool(torch.isneginf(part.lse[b, head]).all())
                    continue
                keys, values = torch.stack([k for k, _, _ in entries]), torch.stack([v for _, v, _ in entries])
                logits = q[b, head] @ keys.T * D**-0.5
                if side:
                    logits = logits + torch.tensor([entry[2] for entry in entries], dtype=torch.float64)
                assert torch.allclose(part.out[b, head], logits.softmax(-1) @ values, atol=1e-6)
                assert torch.allclose(part.lse[b, head], logits.logsumexp(-1), atol=1e-6)


def test_a_query_sees_the_first_entries_of_its_pair():
    store, lists = filled()
    n = 9
    seen = torch.minimum(torch.arange(n), store.counts.unsqueeze(-1))
    q = torch.randn(B, H, n, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    out = store.attend(q, seen=seen).out
    for (b, h), entries in lists.items():
        for i in range(n):
            first = entries[: int(seen[b, h, i])]
            if not first:
                assert not out[b, h, i].any()
                continue
            keys, values = torch.stack([k for k, _, _ in first]), torch.stack([v for _, v, _ in first])
            assert torch.allclose(out[b, h, i], (q[b, h, i] @ keys.T * D**-0.5).softmax(-1) @ values, atol=1e-12)


@pytest.mark.parametrize("gradients", [False, True])
def test_tiles_of_queries_see_the_first_tiles_of_entries(gradients: bool):
    """The same by tiles and by single queries, with chunks of three tokens that are kept or not."""
    k, v, _, _ = drawn(12, 5)
    chunks = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]]], dtype=torch.bool)
    weight = torch.zeros(B, H, 12, dtype=torch.float64, requires_grad=gradients)
    store = KeptKeys.none(k, v).add(k, v, chunks.repeat_interleave(3, 2), **({"log_weight": weight} if gradients else {}))
    q = torch.randn(B, 2 * H, 11, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=gradients)
    seen = 3 * torch.cat([torch.zeros(B, H, 1, dtype=torch.int64), chunks.cumsum(-1)[..., :3]], -1)
    by_tile, single = store.attend(q, seen=seen, tile=3), store.attend(q, seen=seen.repeat_interleave(3, 2)[..., :11])
    assert torch.allclose(by_tile.out, single.out, atol=1e-12) and not by_tile.out[:, :, :3].any()
    assert by_tile.lse is not None and single.lse is not None
    assert torch.allclose(by_tile.lse, single.lse, atol=1e-12)
    if gradients:
        found = [torch.autograd.grad(part.out.square().sum(), [q, weight], retain_graph=True) for part in (by_tile, single)]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True)) and found[0][1].abs().max() > 1e-3


def test_rows_are_reordered_repeated_joined_and_stored(tmp_path):
    store, lists = filled()
    rows = [1, 0, 0, 1]
    check(store.reorder(torch.tensor(rows)), lists, rows)
    check(KeptKeys.joined([store.reorder(torch.tensor([row])) for row in (0, 1)]), lists)
    bare = store.reorder(torch.tensor([0])).without("score")
    joined = KeptKeys.joined([bare, store.reorder(torch.tensor([1]))])
    assert not joined.side["score"][: int(bare.counts.sum())].any()
    write(tmp_path / "kept.safetensors", "kept/1", {}, store)
    check(read(tmp_path / "kept.safetensors", "kept/1")[1], lists)
    k, v, _, _ = drawn(1, 0)
    write(tmp_path / "none.safetensors", "kept/1", {}, KeptKeys.none(k, v))
    assert read(tmp_path / "none.safetensors", "kept/1")[1].keys.shape == (0, D)
    with pytest.raises(ValueError, match="can't be taken back by 2 tokens"):
        store.crop(2)


def test_gradients_pass_through_additions_and_choices():
    k, v, chosen, score = drawn(5, 7)
    k.requires_grad_()
    chosen[:] = True
    store = KeptKeys.none(k, v).add(k, v, chosen, score=score).add(k * 2, v, chosen, score=score + 10).best("score", 2)
    (grad,) = torch.autograd.grad(store.keys.sum(), k)
    best = torch.zeros(B, H, 5, dtype=torch.float64).scatter(-1, score.topk(2, -1).indices, 2.0)
    assert torch.equal(grad, best.unsqueeze(-1).expand_as(k))
    with torch.no_grad():
        assert store.add(k, v, chosen, score=score).counts.sum() == store.counts.sum() + chosen.sum()
