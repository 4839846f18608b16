"""soft: the Gaussian kernel, landmarks, Newton's inverse and its gradient."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.methods.linear.soft import gaussian, landmark_read, middle
from saccade.parts.linear.newton import newton_inverse


def layer(spec: str = "soft(ratio=2)", seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def heads(n: int = 36, d: int = 8):
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, n, d, dtype=torch.float64, generator=draw) for _ in range(2))


@torch.no_grad()
def test_all_tokens_as_landmarks_give_the_whole_kernel():
    q, v = heads()
    s = gaussian(q, q)
    errors = [float((landmark_read(q, q, v, ridge=ridge, steps=60) - s @ v).abs().max()) for ridge in (1e-2, 1e-3, 1e-4)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 1e-3 and errors[2] < errors[0] / 50
    order = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    assert (landmark_read(q, q[:, :, order], v, steps=60) - landmark_read(q, q, v, steps=60)).abs().max() < 1e-10


@torch.no_grad()
def test_the_kernel_is_symmetric_positive_with_a_unit_diagonal():
    q, _ = heads()
    s = gaussian(q, q)
    assert (s.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 1e-12 and (s - s.mT).abs().max() < 1e-14
    assert torch.linalg.eigvalsh(s).min() > -1e-12 and s.max() <= 1
    assert (s - torch.exp(-torch.cdist(q, q, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 2)).abs().max() < 1e-12


@torch.no_grad()
def test_newton_s_residual_is_squared_in_every_step():
    q, _ = heads(20)
    p = gaussian(q, q) + 0.01 * torch.eye(20, dtype=torch.float64)
    eye = torch.eye(20, dtype=torch.float64)
    before = eye - p @ newton_inverse(p, 1)
    assert torch.linalg.matrix_norm(before, 2).max() < 1
    for steps in range(2, 14):
        now = eye - p @ newton_inverse(p, steps)
        assert (now - before @ before).abs().max() < 1e-10
        before = now
    assert (newton_inverse(p, 60) - torch.linalg.inv(p)).abs().max() < 1e-9


def test_the_gradient_is_that_of_the_inverse():
    q, _ = heads(12)
    p = (gaussian(q, q) + 0.01 * torch.eye(12, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, expected = (torch.autograd.grad((f(p) * weights).sum(), p)[0] for f in (lambda p: newton_inverse(p, 60), torch.linalg.inv))
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@torch.no_grad()
def test_normalisation_bounds_the_spectrum():
    """D^-1/2 P^-1 D^-1/2 shrinks what P^-1 alone makes large, as rows of P sum to at least 1."""
    q, _ = heads()
    plain, bounded = (torch.linalg.eigvalsh(middle(q * 0.3, 0.01, normalised)).amax(-1) for normalised in (False, True))
    assert (bounded < plain / 2).all()
    p = gaussian(q, q) + 0.01 * torch.eye(36, dtype=torch.float64)
    root = p.sum(-1).rsqrt()
    expected = root.unsqueeze(-1) * torch.linalg.inv(p) * root.unsqueeze(-2)
    assert (middle(q, 0.01, True, 60) - expected).abs().max() < 1e-9


@torch.no_grad()
def test_landmarks_stand_for_squares_of_tokens():
    made = layer("soft(ratio=3, grid=(6, 9))")
    x = torch.randn(1, 54, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    q = made.queries(x)
    marks = made.landmarks(q, x, (6, 9))
    assert marks.shape == (1, 4, 6, 8)
    other = q.clone()
    other[:, :, 9 * 4 + 5] += 1  # row 4, column 5: the square in row 1, column 1
    change = (made.landmarks(other, x, (6, 9)) - marks).abs().amax((0, 1, 3))
    assert (change > 1e-9).nonzero().flatten().tolist() == [4]


@torch.no_grad()
def test_a_ratio_of_1_reads_the_whole_kernel():
    made = layer("soft(ratio=1, kernel=0)")
    x = torch.randn(1, 300, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    q, v = made.queries(x), made.split(made.v_proj(x))
    assert (made(x)[0] - made.o_proj(made.joined(gaussian(q, q) @ v, x))).abs().max() < 1e-11


def test_there_is_one_projection_for_queries_and_keys():
    made = layer()
    assert made.k_proj is None and made.queries(torch.zeros(1, 4, 32, dtype=torch.float64)).shape == (1, 4, 4, 8)
    for spec, message in (("ratio=0", "at least 1"), ("kernel=2", "odd width"), ("ridge=-1.0", "at least 1, 1 and 0")):
        with pytest.raises(ValueError, match=message):
            layer(f"soft({spec})")
