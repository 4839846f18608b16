"""attamba: which keys are seen, what they hold, and how many are kept."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear.gates import heads_first


def layer(spec: str, **sizes: int):
    torch.manual_seed(0)
    made = saccade.mixer(spec, dim=16, heads=2, **sizes).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return made


def tokens(n: int) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_chunks_of_one_token_without_a_state_are_attention_to_the_tokens():
    """P = 1 and an SSM of zero: causal attention whose keys and values are x."""
    mixer, x = layer("attamba(chunk=1)"), tokens(40)
    for ssm in (mixer.k_ssm, mixer.v_ssm):
        ssm.out_proj.weight.zero_()
    places = torch.arange(40)[None]
    q, k = (mixer.rotary(heads_first(one, 2), places) for one in (mixer.q_proj(x), x))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, heads_first(x, 2), is_causal=True)
    assert (mixer(x)[0] - mixer.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-12


@pytest.mark.parametrize("ends", ["cyclic", "uniform", "random"])
@pytest.mark.parametrize("lead", [0, 3, 11])
def test_rows_of_the_mask_have_the_ends_and_the_window(ends: str, lead: int):
    mixer, i = layer(f"attamba(chunk=4, lead={lead}, ends={ends!r})", layer=1, layers=2), torch.arange(60)
    mask, end = mixer.mask(i, i), mixer.is_end(i)
    for t in range(60):
        assert int(mask[t].sum()) == int(end[: max(t - lead, 0)].sum()) + min(t, lead) + 1
    stretches = end[4:].reshape(-1, 4).sum(1)
    assert (stretches == 1).all() and end[0]


def test_ends_move_from_layer_to_layer():
    i = torch.arange(8, 32)
    firsts = [int(layer("attamba(chunk=8)", layer=n, layers=4).is_end(i).nonzero()[0]) for n in range(4)]
    assert firsts == [7, 1, 3, 5]
    same = [int(layer("attamba(chunk=8, ends='uniform')", layer=n, layers=4).is_end(i).nonzero()[0]) for n in range(4)]
    assert same == [7] * 4
    drawn = layer("attamba(chunk=8, ends='random')").is_end(torch.arange(8, 808)).reshape(-1, 8)
    assert (drawn.sum(0) > 0).all()


@torch.no_grad()
def test_a_key_sums_up_its_chunk_and_nothing_else():
    mixer, x = layer("attamba(chunk=5)"), tokens(30)
    begins = (torch.arange(30) == 0) | mixer.is_end(torch.arange(30) - 1)
    y = mixer.k_ssm(x, begins, None)[0]
    other = x.clone()
    other[:, 11] += 1  # its chunk is 10 ... 14
    changed = (mixer.k_ssm(other, begins, None)[0] - y).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [11, 12, 13, 14]


@torch.no_grad()
def test_decoding_equals_the_masked_form_and_keeps_few_entries():
    mixer, x = layer("attamba(chunk=8, lead=4)"), tokens(200)
    y, state = mixer(x[:, :100])
    outs = [y]
    for t in range(100, 200):
        y, state = mixer(x[:, t : t + 1], state)
        outs.append(y)
        entries = state.values["ends"].layer.tail.n + state.values["k"].shape[1]
        assert entries <= (t + 1) / 8 + 4 + 2
    assert (torch.cat(outs, 1) - mixer.naive(x)).abs().max() < 1e-11


@torch.no_grad()
def test_every_key_can_be_seen_for_comparison():
    mixer = layer("attamba(every=True)")
    i = torch.arange(30)
    assert torch.equal(mixer.mask(i, i), torch.ones(30, 30).tril().bool())
    x = tokens(30)
    assert (mixer(x)[0] - mixer.naive(x)).abs().max() < 1e-12
    assert (mixer(x)[0] - layer("attamba")(x)[0]).abs().max() > 1e-3


def test_what_does_not_fit_is_refused():
    for fields in ("ends='none'", "chunk=0", "lead=-1", "states=0", "theta=0"):
        with pytest.raises(ValueError, match=fields.split("=")[0]):
            saccade.mixer(f"attamba({fields})", dim=16, heads=2)
    with pytest.raises(ValueError, match="keys are the tokens themselves"):
        saccade.mixer("attamba", dim=16, heads=4, kv_heads=2)
