"""KVStore: a KVLayer as part of a mixer's state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.cache.kv_store import KVStore


def entries(b: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, 2, n, 4, generator=generator), torch.randn(b, 2, n, 3, generator=generator)


def test_it_grows_and_knows_padding():
    store = KVStore()
    (k, v), (k2, v2) = entries(2, 5), entries(2, 1, 1)
    keys, values, real = store.append(k, v, None)
    assert torch.equal(keys, k) and torch.equal(values, v) and real is None
    keys, values, real = store.append(k2, v2, torch.tensor([[True], [False]]))
    assert torch.equal(keys, torch.cat([k, k2], 2)) and torch.equal(values, torch.cat([v, v2], 2))
    assert real.tolist() == [[True] * 6, [True] * 5 + [False]]
    assert store.nbytes >= 2 * 2 * 6 * 7 * 4


def test_copies_go_their_own_way():
    store = KVStore()
    store.append(*entries(2, 5), None)
    copy, turned = store.copy(), store.reorder(torch.tensor([1, 1, 0]))
    store.append(*entries(2, 1, 1), None)
    copy.append(*entries(2, 1, 2), None)
    assert torch.equal(store.layer.keys[:, :, 5:], entries(2, 1, 1)[0]) and torch.equal(copy.layer.keys[:, :, 5:], entries(2, 1, 2)[0])
    assert torch.equal(turned.layer.keys, entries(2, 5)[0][[1, 1, 0]])
    assert KVStore().copy().layer.tail is None


def test_tokens_are_taken_back_but_not_through_padding():
    store = KVStore()
    store.append(*entries(2, 5), None)
    store.append(*entries(2, 2, 1), torch.tensor([[True, True], [True, False]]))
    with pytest.raises(ValueError, match="padding"):
        store.crop(1)
    plain = KVStore()
    plain.append(*entries(2, 5), None)
    shorter = plain.crop(2)
    assert torch.equal(shorter.layer.keys, entries(2, 5)[0][:, :, :3]) and plain.layer.tail.n == 5


def test_rows_of_different_lengths_are_joined():
    stores = [KVStore(), KVStore()]
    for store, n in zip(stores, (3, 5), strict=True):
        store.append(*entries(1, n, n), None)
    joined = KVStore.joined(stores)
    assert joined.layer.tail.real.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(joined.layer.keys[0, :, :3], entries(1, 3, 3)[0][0]) and torch.equal(joined.layer.values[1], entries(1, 5, 5)[1][0])
    with pytest.raises(ValueError, match="empty store"):
        KVStore.joined([stores[0], KVStore()])


def test_gradients_pass_through_earlier_entries():
    store = KVStore()
    k, v = (x.requires_grad_() for x in entries(1, 3))
    first = store.append(k, v, None)[0]
    kept = (first * first).sum()  # keeps the first view for its backward pass
    second = store.append(*(x.requires_grad_() for x in entries(1, 1, 1)), None)[0]
    (kept + second.sum()).backward()
    assert torch.allclose(k.grad, 2 * k + 1)
