"""sse: both forms, one partition as the plain host, untouched partitions, and what more of them recall."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops.scan import scan
from saccade.parts.linear.partitions import chosen, gathered, masked

SPECS = ["sse(rank=4, top=2)", "sse(rank=4, rows=3, partitions=3)", "sse(rank=4, host='gdn')"]


def made(spec: str):
    torch.manual_seed(0)
    layer = saccade.mixer(spec, dim=32, heads=4).double()
    for part in (layer.q_low, layer.k_low):
        part[1].weight.data.normal_(0, 0.3)
    return layer


@pytest.mark.parametrize("spec", SPECS)
def test_both_forms_agree(spec: str):
    first, second = (made(spec[:-1] + f", form='{form}')") for form in ("masked", "gathered"))
    x = torch.randn(3, 90, 32, dtype=torch.float64)
    (a, one), (b, two) = first(x), second(x)
    assert (a - b).abs().max() < 1e-12
    for name in ("s", "parts"):
        assert (one.values[name] - two.values[name]).abs().max() < 1e-12
    assert (first(x, one)[0] - second(x, two)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("spec", ["sse(rank=4, partitions=1)", "sse(rank=4, host='gdn', partitions=1)"])
def test_one_partition_is_the_host(spec: str):
    layer = made(spec)
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    call = layer.whole(x)
    v = layer.v_map(layer.v_proj(x).unflatten(-1, (4, 8)).transpose(1, 2))
    halves = [layer.half(x, index, call) for index in range(2)]
    out = sum(scan(q, k, v, log_decay=g, beta=beta, scale=layer.scale)[0] for q, k, g, beta in halves)
    assert (layer(x)[0] - layer.finish(layer.normaliser.after(out, call, None), x)).abs().max() < 1e-12


def test_all_mass_on_one_partition_is_one_partition():
    many, one = made("sse(rank=4, partitions=4)"), made("sse(rank=4, partitions=1)")
    one.load_state_dict({name: value for name, value in many.state_dict().items() if name != "router.weight"}, strict=False)
    many.shares = lambda x: (torch.tensor([0.0, 0.0, 1.0, 0.0]).double().expand(2, 60, 4), torch.full((2, 60, 1), 2))
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    y, state = many(x)
    assert (y - one(x)[0]).abs().max() < 1e-12
    assert state.values["parts"][:, [0, 1, 3]].abs().max() == 0 < state.values["parts"][:, 2].abs().max()


@pytest.mark.parametrize("form", ["masked", "gathered"])
@pytest.mark.parametrize("spec", SPECS)
def test_other_partitions_stay_as_they_are_to_the_bit(spec: str, form: str):
    layer = made(spec[:-1] + f", form='{form}')").float()
    x = torch.randn(2, 40, 32)
    state = layer(x[:, :-1])[1]
    before = state.values["parts"].clone()
    after = layer(x[:, -1:], state)[1].values["parts"]
    _, picked = layer.shares(x[:, -1:])
    for row in range(2):
        for part in range(before.shape[1]):
            same = torch.equal(before[row, part], after[row, part])
            assert same == (part not in picked[row, 0].tolist())


def test_rows_that_a_key_leaves_out_are_neither_written_nor_forgotten():
    layer = made("sse(rank=4, rows=2)")
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    state = layer(x[:, :-1])[1]
    before = state.values["s"].clone()
    after = layer(x[:, -1:], state)[1].values["s"]
    _, k, decay, _ = layer.half(x[:, -1:], 0, layer.whole(x[:, -1:]))
    touched = (k > 0)[0, :, 0]
    assert touched.sum(-1).tolist() == [2] * 4 and torch.allclose(k.sum(-1), torch.ones(1, 4, 1).double())
    assert torch.equal((before != after).any(-1)[0], touched) and torch.equal(decay[0, :, 0] != 0, touched)


def test_more_partitions_recall_more_pairs():
    """Associative recall without training: each key goes to one of N partitions, always the same one, and meets fewer others there."""
    torch.manual_seed(1)
    pairs, d = 96, 16
    keys, values = (torch.nn.functional.normalize(torch.randn(pairs, size), dim=-1) for size in (d, 32))
    router, found = torch.randn(d, 16), []
    for parts in (1, 2, 4, 8):
        share = (8 * keys @ router[:, :parts]).softmax(-1)
        picked, ones = chosen(share[None], 1), torch.ones(1, pairs, parts)
        k, v = keys[None, None], values[None, None]
        _, states = masked(k, k, v, ones, picked, None, log_decay=None, beta=None, scale=1.0)
        assert states is not None
        read = torch.stack([keys[i] @ states[0, picked[0, i, 0], 0] for i in range(pairs)])
        found.append(float(((read @ values.T).argmax(-1) == torch.arange(pairs)).float().mean()))
    assert found == sorted(found) and found[-1] > found[0] + 0.2, found


def test_the_shares_weigh_writing_and_reading():
    """One token, read again by another: e of the first times e of the second."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    share = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]], dtype=torch.float64)
    picked = torch.zeros(1, 2, 1, dtype=torch.int64)
    k[:, :, 1] = 0
    for run in (masked, gathered):
        out = run(q, k, v, share, picked, None, log_decay=None, beta=None, scale=1.0)[0]
        expected = 0.7 * 0.6 * (q[:, :, 1] * k[:, :, 0]).sum(-1, keepdim=True) * v[:, :, 0]
        assert (out[:, :, 1] - expected).abs().max() < 1e-12


def test_the_balance_loss_is_least_where_all_are_used():
    layer = made("sse(rank=4)")
    x = torch.randn(4, 200, 32, dtype=torch.float64)
    even = layer.balance(x)
    assert abs(float(even.detach()) - 0.01) < 0.003  # N / K * sum of 1/N * K/N
    even.backward()
    assert layer.router.weight.grad.abs().max() > 0
    layer.router.weight.data[0] = 50 * x[0, 0]
    assert float(layer.balance(x[:1, :1].expand(1, 50, -1)).detach()) > 0.03


def test_equal_shares_go_to_the_first_partitions():
    assert chosen(torch.full((1, 1, 5), 0.2), 2).tolist() == [[[0, 1]]]
    assert chosen(torch.tensor([[[0.1, 0.3, 0.2, 0.3]]]), 2).tolist() == [[[1, 3]]]


def test_wrong_fields_are_refused():
    for spec, message in (
        ("sse(top=5)", "top from 1"), ("sse(host='rwkv')", "'gla' or 'gdn'"), ("sse(rows=2, host='gdn')", "use host='gla'"),
        ("sse(rows=9)", "at most as many"), ("sse(rank=0)", "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
