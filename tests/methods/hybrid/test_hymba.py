"""hymba: the two kinds of heads, the meta tokens behind a moving window, and what a model of such layers keeps."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.methods.hybrid.hymba import hymba_layers
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM
from saccade.parts.linear.selective import SelectiveState

SAME = 1e-10


def layer(spec: str, **sizes):
    torch.manual_seed(0)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, "kv_heads": 2, **sizes}).double()


def tokens(n: int, dim: int = 32) -> torch.Tensor:
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_without_meta_tokens_and_state_space_it_is_attention_with_a_norm():
    hymba, x = layer("hymba(window=None, meta=0)"), tokens(40)
    hymba.space_norm.weight.zero_()
    plain = layer("softmax", head_dim=16)
    plain.load_state_dict({name: hymba.attention.state_dict().get(name, torch.eye(64, dtype=torch.float64)[:32])
                           for name in plain.state_dict()})  # fmt: skip
    plain.o_proj = torch.nn.Identity()
    attended = plain.naive(x)
    assert attended.shape[-1] == 64
    normed = attended * (attended.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert (hymba(x)[0] - hymba.o_proj(normed / 2)).abs().max() < SAME


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_global():
    x = tokens(40)
    windowed, whole = layer("hymba(window=40, meta=4)"), layer("hymba(window=None, meta=4)")
    windowed.load_state_dict(whole.state_dict())
    assert (windowed(x)[0] - whole(x)[0]).abs().max() < SAME
    short = layer("hymba(window=8, meta=4)")
    short.load_state_dict(whole.state_dict())
    assert (short(x)[0] - whole(x)[0])[:, 12:].abs().max() > 1e-3


def test_meta_tokens_stay_visible_and_others_leave_the_window():
    """Attention alone: the last token's output depends on the first 4 tokens and on the last 8, and on nothing between."""
    hymba, x = layer("hymba(window=8, meta=4)"), tokens(40).requires_grad_()
    hymba.space_norm.weight.data.zero_()
    (grad,) = torch.autograd.grad(hymba(x)[0][:, -1].square().sum(), x)
    seen = grad.abs().amax((0, 2)) > 0
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, 3, *range(32, 40)]


@torch.no_grad()
def test_the_state_space_is_the_recurrence_of_its_definition():
    torch.manual_seed(2)
    space, x = SelectiveState(6, 3, 2, 4).double(), tokens(20, 6)
    call = layer("hymba").whole(x)
    u = torch.zeros(2, 20, 6, dtype=torch.float64)
    for t in range(20):
        for j in range(4):
            if t - 3 + j >= 0:
                u[:, t] += space.conv.weight[:, j] * x[:, t - 3 + j]
    u = torch.nn.functional.silu(u + space.conv.bias)
    low, write, read = (norm(part) for norm, part in zip(space.norms, space.x_proj(u).split([2, 3, 3], -1), strict=True))
    step = torch.nn.functional.softplus(space.step_proj(low))
    a, h, expected = -space.a_log.exp(), torch.zeros(2, 6, 3, dtype=torch.float64), []
    for t in range(20):
        h = torch.exp(step[:, t, :, None] * a) * h + (step[:, t] * u[:, t])[..., None] * write[:, t, None]
        expected.append((h * read[:, t, None]).sum(-1) + space.skip * u[:, t])
    assert (space(x, {}, call)[0] - torch.stack(expected, 1)).abs().max() < SAME
    assert torch.allclose(a[0], torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64))


def test_the_norms_make_branches_of_different_scale_weigh_alike():
    hymba, x = layer("hymba(window=8, meta=4)"), tokens(40)
    before = hymba(x)[0]
    hymba.attention.v_proj.weight.data *= 1000
    assert (hymba(x)[0] - before).abs().max() < 1e-3 * before.abs().max()


def model(count: int = 8, meta: int = 4) -> SaccadeForCausalLM:
    torch.manual_seed(3)
    made = SaccadeForCausalLM(SaccadeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        layers=hymba_layers(count, window=8, meta=meta, state=4), meta_tokens=meta,
    ))  # fmt: skip
    return made.double().eval()


def test_layers_are_global_three_times_and_share_keys_in_pairs():
    specs = hymba_layers(32)
    assert [i for i, spec in enumerate(specs) if "window=None" in spec] == [0, 15, 31]
    shared = [i for i, spec in enumerate(specs) if "kv_from" in spec]
    assert shared == [*range(2, 15, 2), *range(17, 31, 2)] and "kv_from=1" in specs[2]
    assert [i for i, spec in enumerate(hymba_layers(32, everywhere=[5, 31], share=False)) if "window=None" in spec] == [5, 31]
    with pytest.raises(ValueError, match="count from 0"):
        hymba_layers(4, everywhere=[4])


@torch.no_grad()
def test_steps_equal_the_prompt_at_once_in_a_model_with_meta_tokens():
    lm = model()
    ids = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(4))
    whole = lm(ids).logits
    out = lm(ids[:, :11], use_cache=True)
    steps = [out.logits]
    for t in range(11, 30):
        out = lm(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < SAME
    lm.model.meta.data += 1.0
    assert (lm(ids).logits - whole).abs().max() > 1e-3


@torch.no_grad()
def test_keys_are_kept_once_for_every_pair_and_only_the_window_and_meta_of_them():
    lm = model()
    sizes = {}
    for n in (20, 50):
        cache = lm(torch.randint(3, 64, (1, n)), use_cache=True).past_key_values
        sizes[n] = [layer.state.values["attention"] for layer in cache.layers]
    pair = 2 * 2 * 16 * 8  # bytes of one token's keys and values: 2 of them, 2 heads, 16 channels, float64
    for kept in sizes.values():
        for index in (1, 4, 6):
            assert sum(x.numel() * x.element_size() for x in kept[index].values()) == (4 + 7) * pair
        assert kept[2] == {} and kept[5] == {}
    for n, kept in sizes.items():
        assert [kept[index]["kv"].layer.tail.n for index in (0, 3, 7)] == [n + 4] * 3


@pytest.mark.parametrize(("spec", "message"), [
    ("hymba(window=0)", "at least 1 token"), ("hymba(meta=-1)", "meta tokens"), ("hymba(state=0)", "at least 1 of each"),
    ("hymba(theta=0)", "positive base"), ("hymba(kv_from=0)", "name an earlier layer"),
])  # fmt: skip
def test_wrong_fields_are_refused(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        saccade.mixer(spec, dim=32, heads=4)
    with pytest.raises(ValueError, match="heads of an even width"):
        saccade.mixer("hymba(expand=1)", dim=30, heads=4, head_dim=8)
