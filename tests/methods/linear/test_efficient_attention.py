"""efficient-attention: its two normalisations, both ways, and the gated scan behind the causal one."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops.scan import scan


def made(spec: str, n: int = 60, seed: int = 0):
    """(layer, x, q, k, v) in float64, two heads of 12 channels."""
    torch.manual_seed(seed)
    layer = saccade.mixer(spec, dim=24, heads=2).double()
    x = 2 * torch.randn(2, n, 24, dtype=torch.float64)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    return layer, x, q, k, v


def close(layer, x: torch.Tensor, out: torch.Tensor) -> bool:
    return bool((layer(x)[0] - layer.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-12)


def test_scaling_is_dot_product_attention_divided_by_the_tokens():
    layer, x, q, k, v = made("efficient-attention(norm='scaling', bidirectional=True)")
    assert close(layer, x, q @ k.mT @ v / 60)
    layer, x, q, k, v = made("efficient-attention(norm='scaling')")
    assert close(layer, x, (q @ k.mT).tril() @ v / torch.arange(1.0, 61.0).double()[:, None])


def test_softmax_rows_are_distributions():
    layer, x, q, k, v = made("efficient-attention(bidirectional=True)")
    weights = q.softmax(-1) @ k.softmax(2).mT
    assert weights.min() >= 0 and torch.allclose(weights.sum(-1), torch.ones(2, 2, 60).double())
    assert close(layer, x, weights @ v)


def test_the_causal_form_is_a_scan_with_a_gate_per_channel():
    layer, x, q, k, v = made("efficient-attention", n=130)
    z = k.logcumsumexp(2)
    gate = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1] - z[:, :, 1:]], dim=2)
    assert close(layer, x, scan(q.softmax(-1), (k - z).exp(), v, log_decay=gate, scale=1.0, impl="reference")[0])
    # and each row is the softmax over the tokens it may see
    rows = [q[:, :, t].softmax(-1).unsqueeze(2) @ k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1] for t in range(130)]
    assert close(layer, x, torch.cat(rows, dim=2))


def test_the_last_token_reads_the_same_both_ways():
    both, one = (made(f"efficient-attention({more})") for more in ("bidirectional=True", ""))
    assert (both[0](both[1])[0] - one[0](one[1])[0])[:, -1].abs().max() < 1e-12


def test_padding_takes_no_part_in_the_softmax_over_tokens():
    layer, x, *_ = made("efficient-attention(bidirectional=True)")
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, 40:] = False
    assert (layer(x, valid=valid)[0][0, :40] - layer(x[:1, :40])[0][0]).abs().max() < 1e-12


def test_memory_grows_with_the_tokens():
    """Bytes that autograd keeps at 4 times the tokens: 4 times as many, where weights would take 16 times."""
    layer = saccade.mixer("efficient-attention(bidirectional=True)", dim=24, heads=2)
    sizes = []
    for n in (512, 2048):
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(torch.randn(1, n, 24), keep=False)[0]
        sizes.append(sum(kept.values()))
        assert y.shape[1] == n
    assert sizes[1] < 4.2 * sizes[0]


def test_wrong_fields_are_refused():
    for spec, message in (("efficient-attention(norm='l2')", "is not 'softmax'"), ("efficient-attention(key_dim=0)", "at least 1 channel")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=24, heads=2)
