"""What every registered mixer keeps to: three forms that agree, padding, batches, states, causality, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.core import Mixer, MixerShape, MixerState, TokenMixer, format_spec
from saccade.core.storage import read, write
from saccade.methods import build_mixer, load_all

MIXERS: dict[str, type[Mixer]] = {slug: kind for slug, kind in load_all().items() if issubclass(kind, Mixer)}
# every mixer with its fields for short sequences, and the further settings it names
SPECS = [format_spec(slug, dict(fields)) for slug, kind in MIXERS.items() for fields in (kind.info.tiny, *kind.info.variants)]
ONE_WAY = [spec for spec in SPECS if build_mixer(spec).info.causality != "bidirectional"]
TWO_WAY = [spec for spec in SPECS if spec not in ONE_WAY]
FIRST = {format_spec(slug, dict(kind.info.tiny)) for slug, kind in MIXERS.items()}
SAME = 1e-10  # two forms in float64
N = 75  # no multiple of a chunk or a window


def layer(spec: str, dtype: torch.dtype = torch.float64, **sizes: int) -> TokenMixer:
    torch.manual_seed(3)
    shape = MixerShape(**{"dim": 32, "heads": 4, "layer": 1, "layers": 4, "max_length": 128, **sizes})
    made = build_mixer(spec).module(shape).double()
    for x in made.parameters():
        # so that parts which start at zero or one do something
        x.data += 0.05 * torch.randn(x.shape, dtype=x.dtype)
    return made.to(dtype)


def tokens(b: int = 3, n: int = N, dim: int = 32, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def first_of(specs: list[str]) -> list[Any]:
    """One spec of each mixer for the fast tests, the others for the slow ones."""
    return [spec if spec in FIRST else pytest.param(spec, marks=pytest.mark.slow) for spec in specs]


def opted_out(spec: str, axis: str) -> None:
    reasons = build_mixer(spec).info.opts_out
    if axis in reasons:
        pytest.skip(reasons[axis])


def in_pieces(mixer: TokenMixer, x: Tensor, lengths: list[int], state: MixerState | None = None) -> tuple[Tensor, MixerState]:
    outs = []
    for part in x.split(lengths, dim=1):
        y, state = mixer(part, state)
        outs.append(y)
    assert state is not None
    return torch.cat(outs, 1), state


def same_state(a: MixerState, b: MixerState, mixer: TokenMixer) -> None:
    """Whatever comes next is the same after both."""
    assert torch.equal(a.position, b.position)
    after = tokens(a.batch, 5, seed=11)
    with torch.no_grad():
        assert error(mixer(after, a.copy())[0], mixer(after, b.copy())[0]) < SAME


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_builds_it_again_and_it_says_what_it_is(spec: str):
    method = build_mixer(spec)
    assert build_mixer(method.spec) == method
    assert method.info.phase == "mixer"
    assert layer(spec).causality == method.info.causality


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_many_tokens_equal_the_definition(spec: str):
    mixer, x = layer(spec), tokens()
    y, _ = mixer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert error(y, mixer.naive(x)) < SAME
    one, two = tokens(n=1), tokens(n=2)
    assert error(mixer(one)[0], mixer.naive(one)) < SAME and error(mixer(two)[0], mixer.naive(two)) < SAME


@pytest.mark.parametrize("spec", first_of(ONE_WAY))
@torch.no_grad()
def test_token_by_token_and_in_chunks_equal_the_definition(spec: str):
    mixer, x = layer(spec), tokens()
    whole, end = mixer(x)
    for lengths in ([1] * N, [40, 1, 1, 20, 13], [1, 74]):
        y, state = in_pieces(mixer, x, lengths)
        assert error(y, whole) < SAME, lengths
        same_state(state, end, mixer)


@pytest.mark.parametrize("spec", ONE_WAY)
@torch.no_grad()
def test_key_heads_may_be_shared(spec: str):
    opted_out(spec, "kv_heads")
    mixer, x = layer(spec, kv_heads=2), tokens(n=33)
    whole = mixer.naive(x)
    assert error(mixer(x)[0], whole) < SAME and error(in_pieces(mixer, x, [20] + [1] * 13)[0], whole) < SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", first_of(SPECS))
@torch.no_grad()
def test_rounding_is_that_of_the_definition(spec: str, dtype: torch.dtype):
    exact = layer(spec, dtype).double()  # the weights as they are in dtype
    mixer, x = layer(spec, dtype), tokens(dtype=dtype)
    truth = exact.naive(x.double())
    # an inverse by iteration multiplies roundings by the condition of what is inverted: two orders of its products differ by more
    allowed = (4 if spec.partition("(")[0] == "soft" else 2) * error(mixer.naive(x), truth) + 1e-6
    assert error(mixer(x)[0], truth) <= allowed
    if mixer.causality != "bidirectional":
        assert error(in_pieces(mixer, x, [40] + [1] * 35)[0], truth) <= allowed


@pytest.mark.parametrize("spec", first_of(SPECS))
@torch.no_grad()
def test_padding_changes_nothing_wherever_it_stands(spec: str):
    mixer, x = layer(spec), tokens(n=90)
    valid = torch.ones(3, 90, dtype=torch.bool)
    valid[0, :13], valid[1, 71:], valid[2, [0, 1, 40, 41, 89]] = False, False, False
    y, state = mixer(x, valid=valid)
    for row in range(3):
        alone, end = mixer(x[row : row + 1, valid[row]])
        assert error(y[row, valid[row]], alone[0]) < SAME
        assert not y[row, ~valid[row]].any()
        if state is not None:
            same_state(state.reorder(torch.tensor([row])), end, mixer)
    assert error(mixer(x.masked_fill(~valid.unsqueeze(-1), 1e3), valid=valid)[0], y) == 0


@pytest.mark.parametrize("spec", ONE_WAY)
@torch.no_grad()
def test_padded_batches_go_on_token_by_token_and_in_a_second_turn(spec: str):
    mixer, x = layer(spec), tokens(n=50)
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[0, :13], valid[1, 20:30], valid[2, 41:45] = False, False, False
    ends = [20, 21, 22, 30, 43, 50]
    outs, state = [], None
    for begin, end in zip([0, *ends], ends, strict=False):
        y, state = mixer(x[:, begin:end], state, valid=valid[:, begin:end])
        outs.append(y)
    y = torch.cat(outs, 1)
    for row in range(3):
        assert error(y[row, valid[row]], mixer(x[row : row + 1, valid[row]])[0][0]) < SAME


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(spec: str):
    mixer, x = layer(spec), tokens()
    y = mixer(x)[0]
    for row in range(3):
        assert error(mixer(x[row : row + 1])[0][0], y[row]) < SAME


@pytest.mark.parametrize("spec", ONE_WAY)
@torch.no_grad()
def test_states_are_reordered_repeated_and_joined(spec: str):
    mixer, x, after = layer(spec), tokens(), tokens(n=3, seed=8)
    state = mixer(x)[1]
    expected = mixer(after, state.copy())[0]
    rows = torch.tensor([2, 0, 0, 1])
    assert error(mixer(after[rows], state.reorder(rows))[0], expected[rows]) < SAME
    assert error(mixer(after.repeat_interleave(2, 0), state.repeat(2))[0], expected.repeat_interleave(2, 0)) < SAME
    apart = [state.reorder(torch.tensor([row])) for row in range(3)]
    assert error(mixer(after, MixerState.join(apart))[0], expected) < SAME
    assert error(mixer(after, state)[0], expected) < SAME, "what was made of a state changed it"


@pytest.mark.parametrize("spec", ONE_WAY)
@torch.no_grad()
def test_states_are_saved_and_loaded(spec: str, tmp_path):
    mixer, x = layer(spec), tokens()
    state = mixer(x)[1]
    write(tmp_path / "state.safetensors", "mixer-state/1", {}, state)
    same_state(read(tmp_path / "state.safetensors", "mixer-state/1")[1], state, mixer)


@pytest.mark.parametrize("spec", ONE_WAY)
@torch.no_grad()
def test_states_go_back_or_say_that_they_cannot(spec: str):
    mixer, x = layer(spec), tokens()
    before, state = mixer(x[:, :-4])[1], mixer(x)[1]
    assert state.crop(0) is state
    if state.croppable:
        same_state(state.crop(4), before, mixer)
    else:
        with pytest.raises(ValueError, match="can't be taken back by 4 tokens"):
            state.crop(4)


@pytest.mark.parametrize("spec", ONE_WAY)
@torch.no_grad()
def test_the_state_takes_as_many_bytes_at_every_length(spec: str):
    opted_out(spec, "constant")
    mixer = layer(spec)
    sizes = {mixer(tokens(n=n))[1].nbytes for n in (30, 60, 120)}
    assert len(sizes) == 1 and sizes.pop() > 0


@pytest.mark.parametrize("spec", first_of(ONE_WAY))
@torch.no_grad()
def test_nothing_comes_from_the_future(spec: str):
    mixer, x = layer(spec), tokens()
    y = mixer(x)[0]
    for i in (0, 17, 63, 64, 73):
        other = x.clone()
        other[:, i + 1 :] = tokens(n=N - i - 1, seed=20 + i) * 3
        assert error(mixer(other)[0][:, : i + 1], y[:, : i + 1]) < SAME, i


@pytest.mark.parametrize("spec", first_of(SPECS))
def test_gradients_are_those_of_the_definition(spec: str):
    mixer = layer(spec)
    found = []
    for run in (lambda x: mixer(x, keep=False)[0], mixer.naive):
        x = tokens().requires_grad_()
        wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]
        loss = (run(x) * tokens(seed=9)).sum()
        found.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    for fast, slow in zip(*found, strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None and slow is not None:
            assert torch.isfinite(fast).all()
            assert error(fast, slow) < 1e-8 * (1 + float(slow.abs().max()))
    assert found[0][0].abs().max() > 0


@pytest.mark.parametrize("spec", first_of(ONE_WAY))
def test_gradients_pass_through_the_state(spec: str):
    opted_out(spec, "state_gradient")
    mixer, found = layer(spec), []
    for lengths in ([N], [40, 1, 34]):
        x = tokens().requires_grad_()
        found.append(torch.autograd.grad((in_pieces(mixer, x, lengths)[0] * tokens(seed=9)).sum(), x)[0])
    assert error(*found) < 1e-9


@pytest.mark.parametrize("spec", SPECS)
def test_gradcheck(spec: str):
    opted_out(spec, "gradcheck")
    mixer = layer(spec, dim=8, heads=2)
    assert torch.autograd.gradcheck(lambda x: mixer(x, keep=False)[0], tokens(1, 5, 8).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("spec", SPECS)
def test_under_autocast_it_trains(spec: str):
    """Norms and exponentials give float32 beside the half precision of products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixer, x = layer(spec, torch.float32).to(device), tokens(n=40, dtype=torch.float32).to(device).requires_grad_()
    plain = mixer(x, keep=False)[0]
    with torch.autocast(device, torch.bfloat16):
        y = mixer(x, keep=False)[0].float()
    assert float((y - plain).norm() / plain.norm()) < 0.2
    y.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in [x, *mixer.parameters()] if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", SPECS)
def test_on_a_gpu_it_is_the_same(spec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Kernels in place of plain torch: a prompt, padding, steps and gradients, by the rule of rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default for convolutions and LSTMs in float32
    exact, mixer, definition = (layer(spec, dtype, max_length=512) for _ in range(3))
    exact, mixer, x = exact.double(), mixer.cuda(), tokens(n=300, dtype=dtype)
    truth, plain = exact.naive(x.double()), definition.naive(x)
    allowed = 2 * error(plain, truth) + (1e-2 if dtype == torch.bfloat16 else 1e-4) * float(truth.abs().max())
    valid = torch.ones(3, 320, dtype=torch.bool)
    valid[:, :20] = False
    padded = torch.cat([tokens(n=20, dtype=dtype), x], 1)
    with torch.no_grad():
        assert error(mixer(x.cuda())[0].cpu(), truth) <= allowed
        y, state = mixer(padded[:, :310].cuda(), valid=valid[:, :310].cuda())
        outs = [y[:, 20:]]
        for t in range(290, 300) if mixer.causality != "bidirectional" else ():
            y, state = mixer(x[:, t : t + 1].cuda(), state)
            outs.append(y)
        if mixer.causality != "bidirectional":
            assert error(torch.cat(outs, 1).cpu(), truth) <= allowed
    gradients = []
    for run, given in ((lambda z: mixer(z, keep=False)[0], x.cuda()), (definition.naive, x.clone()), (exact.naive, x.double())):
        given.requires_grad_()
        (run(given).double().cpu() * tokens(n=300, seed=9)).sum().backward()
        gradients.append(given.grad.double().cpu())
    got, plain, truth = gradients
    # recurrent and gated mixers lose digits by their nature: the definition itself, in this dtype, says how many
    assert error(got, truth) <= 2 * error(plain, truth) + (0.05 if dtype == torch.bfloat16 else 1e-3) * float(truth.abs().max())


@pytest.mark.parametrize("spec", TWO_WAY)
def test_bidirectional_mixers_have_no_state(spec: str):
    mixer, x = layer(spec), tokens()
    assert mixer(x)[1] is None
    other = x.clone()
    other[:, -1] += 1
    assert error(mixer(other)[0][:, :1], mixer(x)[0][:, :1]) > 1e-9
    with pytest.raises(ValueError, match="no state"):
        mixer(x, MixerState(torch.zeros(3, dtype=torch.int64), {}))


def test_what_does_not_fit_is_refused_in_a_sentence():
    mixer = layer("deltanet")
    state = mixer(tokens())[1]
    for call, message in (
        (lambda: mixer(tokens(dim=16)), r"expected \(B, N, 32\)"),
        (lambda: mixer(tokens()[:, :0]), "at least one token"),
        (lambda: mixer(tokens(2), state), "the state has 3 rows and x has 2"),
        (lambda: mixer(tokens(), valid=torch.ones(3, 4, dtype=torch.bool)), r"expected bool \(3, 75\)"),
        (lambda: mixer(tokens(), positions=torch.zeros(2, 75)), r"expected \(3 or 1, 75\)"),
        (lambda: MixerShape(dim=30, heads=4), "cannot be split among 4 heads"),
        (lambda: MixerShape(dim=32, heads=4, kv_heads=3), "make kv_heads a divisor"),
        (lambda: MixerShape(dim=32, heads=4, layer=2, layers=2), "not among the layers"),
        (lambda: build_mixer("snapkv"), "acts on the cache phase"),
        (lambda: build_mixer("deltanet(konv=3)"), "did you mean conv"),
        (lambda: build_mixer("deltanett"), "did you mean deltanet"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="floating-point"):
        mixer(torch.zeros(3, 4, 32, dtype=torch.int64))
