"""lolcats: a window over everything is softmax, the ring equals the mask, and what the transfer reaches with and without a window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import TokenMixer
from saccade.methods import build_mixer

N, DIM = 48, 32


def layer(spec: str, kv_heads: int = 2) -> TokenMixer:
    torch.manual_seed(0)
    return saccade.mixer(spec, dim=DIM, heads=4, kv_heads=kv_heads).double()


def tokens(seed: int = 1, n: int = N) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(mixer: TokenMixer, x: Tensor) -> Tensor:
    """What the heads read, before the last projection."""
    found: list[Tensor] = []
    handle = mixer.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))  # pyright: ignore
    mixer(x, keep=False)
    handle.remove()
    return found[0]


def trained_like(spec: str) -> tuple[TokenMixer, TokenMixer]:
    """A softmax layer whose weights are as peaked as a trained one's, and the layer that takes its place."""
    teacher, student = layer("softmax"), layer(spec)
    for name in ("q_proj", "k_proj"):
        getattr(teacher, name).weight.data *= 3
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
    return teacher, student


@pytest.mark.parametrize("factor", [0.1, 0.7])
@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad()
def test_a_window_over_everything_is_softmax(factor: float, affine: bool):
    teacher, student = trained_like(f"lolcats(window={N}, factor={factor}, affine={affine})")
    assert float((student(tokens())[0] - teacher(tokens())[0]).abs().max()) < 1e-12
    # and no longer once the first tokens have left it
    late = tokens(n=N + 8)
    assert float((student(late)[0] - teacher(late)[0])[:, N:].abs().max()) > 1e-4


@pytest.mark.parametrize("window", [0, 1, 7, 40])
@torch.no_grad()
def test_the_ring_equals_the_masked_square(window: int):
    mixer, x, state, outs = layer(f"lolcats(window={window})"), tokens(), None, []
    for t in range(N):
        y, state = mixer(x[:, t : t + 1], state)
        outs.append(y)
    assert float((torch.cat(outs, 1) - mixer.naive(x)).abs().max()) < 1e-12


@torch.no_grad()
def test_weights_sum_to_one():
    mixer, x = layer("lolcats(window=6, affine=True)"), tokens()
    mixer.v_proj.weight.data.zero_()  # pyright: ignore
    mixer.keys = lambda x, call, own=mixer.keys: (own(x, call)[0], torch.ones_like(own(x, call)[1]))  # pyright: ignore
    assert float((heads(mixer, x) - 1).abs().max()) < 1e-12


def taught(spec: str, steps: int = 120) -> tuple[list[float], float]:
    """The losses of the transfer, and the error on tokens that were not seen."""
    teacher, student = trained_like(spec)
    new = [p for name, p in student.named_parameters() if "proj" not in name]
    optimizer, losses = torch.optim.AdamW(new, lr=1e-2, weight_decay=0.0) if new else None, []
    for step in range(steps if optimizer else 0):
        x = tokens(10 + step % 20)
        loss = (heads(student, x) - heads(teacher, x).detach()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()  # pyright: ignore
        loss.backward()
        optimizer.step()  # pyright: ignore
    with torch.no_grad():
        return losses, float((heads(student, tokens(5)) - heads(teacher, tokens(5))).square().mean())


def test_transfer_falls_and_a_window_helps():
    fixed = [f"window=0, feature_map={name!r}" for name in ("elu+1", "relu")]
    found = {spec: taught(f"lolcats({spec})") for spec in ("window=16", "window=0", *fixed)}
    for spec in ("window=16", "window=0"):
        losses = torch.tensor(found[spec][0])
        # each pass over the twenty batches is better than the one before it
        assert bool((losses.view(-1, 20).mean(1).diff() < 0).all()), losses.view(-1, 20).mean(1)
    errors = {spec: error for spec, (_, error) in found.items()}
    untaught = {spec: taught(f"lolcats({spec})", steps=0)[1] for spec in ("window=16", "window=0")}
    assert errors["window=16"] < 0.9 * errors["window=0"] and errors["window=0"] < untaught["window=0"]
    assert errors["window=16"] < untaught["window=16"]
    assert errors["window=0"] < min(errors[spec] for spec in fixed), errors


@torch.no_grad()
def test_the_state_has_as_many_bytes_at_every_length():
    mixer = layer("lolcats(window=8, features=4)").float()
    _, short = mixer(tokens(n=9).float())
    _, long = mixer(tokens(n=400).float())
    # keys and values of the window, the sums and the position
    assert short.nbytes == long.nbytes == 2 * (2 * 8 * 2 * 8 + 4 * 8 * (8 + 1)) * 4 + 2 * 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("window=-1", "window=-1"), ("feature_map='taylor'", "is not one of"), ("features=0", "features=0"), ("factor=1.0", "factor=1.0"),
        ("features=3, feature_map='relu'", "only with 'hedgehog'"), ("theta=0.0", "theta=0.0"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_mixer(f"lolcats({fields})")
