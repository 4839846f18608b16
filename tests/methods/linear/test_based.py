"""based: the Taylor features, windows and convolutions, and what a head recalls by its width."""

from __future__ import annotations

import math

import pytest
import torch

import saccade
from saccade.parts.linear.polynomial import Polynomial
from saccade.train.sets.recall import Recall


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_features_multiply_to_the_taylor_polynomial():
    q, k = rand(40, 16), rand(40, 16, seed=1)
    s = q @ k.T / 4
    for symmetric, width in ((True, 153), (False, 273)):
        phi = Polynomial(symmetric=symmetric)
        assert phi.width(16) == width == phi(q).shape[-1]
        root = 16**-0.25
        assert (phi(q * root) @ phi(k * root).T - (1 + s + s**2 / 2)).abs().max() < 1e-12
    assert (1 + s + s**2 / 2).min() >= 0.5 and s.min() < -1  # positive where first order alone is not


def test_the_linear_layer_is_the_paper_s_sum_without_positions():
    torch.manual_seed(0)
    layer = saccade.mixer("based", dim=64, heads=4).double()
    assert layer.q_proj.weight.shape == (4 * 16, 64)  # 16 channels a head in q and k, whatever the head has in v
    x = rand(1, 50, 64, seed=2)
    q, k = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).unflatten(-1, (4, 16)).transpose(1, 2)
    s = q @ k.mT / math.sqrt(16)
    w = (1 + s + s**2 / 2).tril()
    out = (w / w.sum(-1, keepdim=True)) @ v
    assert (layer(x)[0] - layer.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-12
    order = torch.randperm(49, generator=torch.Generator().manual_seed(1))
    mixed = torch.cat([x[:, order], x[:, 49:]], dim=1)
    assert (layer(mixed)[0][:, 49] - layer(x)[0][:, 49]).abs().max() < 1e-12


def test_a_window_is_softmax_attention_and_a_convolution_reads_three_tokens():
    torch.manual_seed(1)
    x = rand(1, 100, 64, seed=3)
    window = saccade.mixer("based(part='window')", dim=64, heads=4).double()
    exact = saccade.mixer("softmax", dim=64, heads=4).double()
    exact.load_state_dict(window.state_dict())
    difference = (window(x)[0] - exact(x)[0]).abs().amax((0, 2))
    assert difference[:64].max() < 1e-12 < 1e-6 < difference[64:].max()
    conv = saccade.mixer("based(part='conv')", dim=64, heads=4).double()
    other = x.clone()
    other[:, 20] += 1
    change = (conv(other)[0] - conv(x)[0]).abs().amax((0, 2))
    assert change[20:23].min() > 0 and change[:20].max() == 0 and change[23:].max() == 0


def test_a_head_recalls_more_with_more_features():
    """Associative recall without training: each key asks for its value through the layer's weights; more features part more keys."""
    found = []
    for d in (4, 8, 16, 32):
        torch.manual_seed(2)
        keys = torch.nn.functional.normalize(torch.randn(48, d), dim=-1) * math.sqrt(12 * math.sqrt(d))
        values = torch.nn.functional.normalize(torch.randn(48, 64), dim=-1)
        phi = Polynomial()
        root = d**-0.25
        read = phi(root * keys) @ (phi(root * keys).T @ values)
        found.append(float(((read @ values.T).argmax(-1) == torch.arange(48)).float().mean()))
    assert found == sorted(found) and found[0] < 0.5 and found[-1] > 0.95, found


@pytest.mark.slow
def test_recall_after_training_grows_with_the_features():
    """A few hundred steps of multi-query associative recall at one depth: convolution, then the linear part."""
    task, found = Recall(length=32, pairs=6, vocab=32), []
    for features in (1, 8):
        torch.manual_seed(3)
        layers = torch.nn.ModuleList([
            saccade.mixer("based(part='conv')", dim=64, heads=2), saccade.mixer(f"based(features={features})", dim=64, heads=2),
        ])  # fmt: skip
        embed, head = torch.nn.Embedding(task.vocabulary, 64), torch.nn.Linear(64, task.vocabulary)
        norms = torch.nn.ModuleList([torch.nn.RMSNorm(64) for _ in range(3)])
        optimizer = torch.optim.AdamW([*layers.parameters(), *embed.parameters(), *head.parameters(), *norms.parameters()], lr=3e-3)
        generator, right = torch.Generator().manual_seed(4), []
        for _ in range(400):
            ids, labels = task.sample(generator, 24)
            x = embed(ids)
            for layer, norm in zip(layers, norms, strict=False):
                x = x + layer(norm(x), keep=False)[0]
            logits, asked = head(norms[2](x)), labels >= 0
            loss = torch.nn.functional.cross_entropy(logits[asked], labels[asked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right.append(float((logits[asked].argmax(-1) == labels[asked]).float().mean()))
        found.append(sum(right[-50:]) / 50)
    assert found[1] > found[0] + 0.1, found


def test_wrong_fields_are_refused():
    for spec, message in (("based(part='lineer')", "is not 'linear'"), ("based(features=0)", "at least 1 each")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=64, heads=4)
