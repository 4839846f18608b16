"""hybrid-linear-analysis: each of the six recurrences against one step after another, and the grid of models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize, silu, softplus

import saccade
from saccade.core import MixerShape
from saccade.methods.hybrid.hybrid_linear_analysis import GENERATION, KINDS, Cell, HybridLinearAnalysis, grid
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM, schedule

SAME = 1e-10
N, HEADS, D = 20, 4, 8


def layer(kind: str, **sizes):
    torch.manual_seed(0)
    made = saccade.mixer(HybridLinearAnalysis(kind=kind), **{"dim": 32, "heads": HEADS, "layer": 1, "layers": 4, **sizes}).double()
    for x in made.parameters():
        x.data += 0.05 * torch.randn_like(x)
    return made


def tokens() -> torch.Tensor:
    return torch.randn(2, N, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def bounded(made, u: torch.Tensor) -> torch.Tensor:
    """f of layer 1 of 4: its bound is the second share of the softmax over layers."""
    bound = made.logits.softmax(0)[1]
    return bound + (1 - bound) * u.sigmoid()


@torch.no_grad()
def test_hgrn_is_its_one_step_rule_on_a_vector():
    made, x = layer("hgrn"), tokens()
    f = bounded(made.bound, made.f_proj(x))
    h, outs = torch.zeros(2, 32, dtype=torch.float64), []
    for t in range(N):
        h = f[:, t] * h + (1 - f[:, t]) * silu(made.c_proj(x[:, t]))
        outs.append(h)
    normed = made.norm(torch.stack(outs, 1))
    assert (made(x)[0] - made.o_proj(normed * silu(made.out_gate.project(x)))).abs().max() < SAME
    assert made(x)[1].values["h"].shape == (2, 32)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hgrn"])
def test_the_others_are_their_one_step_rules_on_a_matrix(kind: str):
    made, x = layer(kind), tokens()
    call = made.whole(x)
    q, k, v, _ = made.project(x, {}, call)
    keep, beta, scale = torch.ones(2, HEADS, N, D, dtype=torch.float64), None, D**-0.5
    if kind == "retnet":
        q, k = made.rotary(q, call.positions), made.rotary(k, call.positions)
        keep = (1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64)))[None, :, None, None].expand_as(keep)
    elif kind == "gla":
        keep = heads(torch.exp(logsigmoid(made.gate.project(x)) / 16))
    elif kind == "hgrn-2":
        keep = heads(bounded(made.gate.bound, made.k_proj(x)))
        q, k, scale = silu(q), 1 - keep, 1.0
    else:
        q, k, beta = normalize(q, dim=-1), normalize(k, dim=-1), made.strength.project(x).sigmoid().mT
        if kind == "gated-deltanet":
            amount = heads(softplus(made.gate.project(x) + made.gate.bias))
            keep = torch.exp(-made.gate.a_log.exp()[:, None, None] * amount).expand_as(keep)
    s, outs = torch.zeros(2, HEADS, D, D, dtype=torch.float64), []
    for t in range(N):
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        s = keep[:, :, t, :, None] * s
        s = s + key * value if beta is None else s + beta[:, :, t, None, None] * key * (value - key.mT @ s)
        outs.append((q[:, :, t, None] @ s * scale).squeeze(2))
    read = torch.stack(outs, 2)
    normed = read * (read.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * made.normaliser.weight
    # HeadGate keeps its slopes in float32, and the length of a key has a small number added
    assert (made(x)[0] - made.finish(normed, x)).abs().max() < (1e-6 if kind == "retnet" else 1e-9)


@torch.no_grad()
def test_bounds_rise_with_depth_from_nothing():
    """At a closed gate f is its bound: 0 in the first layer, then l / L before training."""
    closed = torch.full((1, 1, 32), -1e3, dtype=torch.float64)
    lowest = []
    for index in range(4):
        made = saccade.mixer(HybridLinearAnalysis(kind="hgrn"), dim=32, heads=4, layer=index, layers=4).double()
        lowest.append(float(made.bound(closed)[0].exp().mean()))
    assert torch.allclose(torch.tensor(lowest), torch.tensor([0, 0.25, 0.5, 0.75]), atol=1e-9)


def test_the_grid_has_every_mixer_at_every_ratio():
    cells = grid()
    assert len(cells) == 30 and len({(cell.kind, cell.pattern) for cell in cells}) == 30
    placed = schedule("3:1", 24, Cell(kind="gla", pattern="3:1").spec)
    assert [i for i, spec in enumerate(placed) if spec == "softmax"] == [3, 7, 11, 15, 19, 23]
    for cell in cells:
        layers = 300 if cell.full_share == 0 else round(12 / cell.full_share)
        assert schedule(cell.pattern, layers, cell.spec).count("softmax") == round(layers * cell.full_share)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_builds_decodes_and_keeps_as_much_as_it_says(kind: str):
    cell = Cell(kind=kind, pattern="3:1")
    torch.manual_seed(2)
    lm = SaccadeForCausalLM(SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=HEADS, layers=schedule("3:1", 4, cell.spec),
    )).double().eval()  # fmt: skip
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(4))
    out = lm(ids[:, :11], use_cache=True)
    state = out.past_key_values.layers[0].state.values["h" if kind == "hgrn" else "s"]
    assert state.numel() == 2 * cell.state_numbers(MixerShape(dim=32, heads=HEADS))
    step = lm(ids[:, 11:], past_key_values=out.past_key_values).logits
    assert (step - lm(ids).logits[:, 11:]).abs().max() < SAME
    assert GENERATION[kind] in (1, 2, 3)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="is not one of hgrn"):
        HybridLinearAnalysis(kind="mamba")
    with pytest.raises(ValueError, match="is not one of hgrn"):
        grid(kinds=["mamba"])
    with pytest.raises(ValueError, match="such as '3:1'"):
        grid(patterns=["3:2"])
