"""Attached models in training: gradients through every static method, with a cache or without, in padded batches, with checkpointing."""

from __future__ import annotations

import pytest
import torch
from tests.contract.harness import llama, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import saccade

SPECS = (
    "longlora", "sinklora(sinks=2)", "s2-attention(block=4, local=2, stride=4, dense_every=0)", "longgen(block=4, window=2)",
    "swat(window=16)", "powerattention(block=4, window=2)",
)  # fmt: skip


@pytest.fixture
def model() -> PreTrainedModel:
    found = llama().train()
    yield found
    found.eval()
    found.zero_grad()


def loss(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    """Nats a token that is not padding, in float64 (transformers' own loss is float32)."""
    logits = model(ids, **options).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(model: PreTrainedModel, ids: Tensor, **options: object) -> list[Tensor]:
    model.zero_grad()
    loss(model, ids, **options).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    # Llama's norms compute in float32, whatever the model's dtype
    return len(a) == len(b) > 10 and all(torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_every_weight_gets_its_gradient(model: PreTrainedModel, spec: str) -> None:
    """Also where the model makes a cache, and with activations computed again; leaving the block restores dense gradients."""
    ids = tokens(2, 60)
    dense = gradients(model, ids, use_cache=False)
    with saccade.attach(model, prefill=spec):
        found = gradients(model, ids, use_cache=False)
        assert same(found, gradients(model, ids))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again = gradients(model, ids, use_cache=False)
        model.gradient_checkpointing_disable()
    assert len(found) == len(list(model.parameters())) and all(bool(x.isfinite().all()) for x in found)
    assert same(found, again) and not same(found, dense)
    assert same(gradients(model, ids, use_cache=False), dense)


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_against_the_slope_of_the_loss(model: PreTrainedModel, spec: str) -> None:
    """Central differences along a random direction of all weights."""
    ids, generator = tokens(1, 40), torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    with saccade.attach(model, prefill=spec):
        slope = sum(float((g * d).sum()) for g, d in zip(gradients(model, ids, use_cache=False), directions, strict=True))
        losses = []
        with torch.no_grad():
            for step in (1e-4, -2e-4):
                for p, d in zip(model.parameters(), directions, strict=True):
                    p.add_(step * d)
                losses.append(float(loss(model, ids, use_cache=False)))
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(1e-4 * d)
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=2e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_has_no_part_in_the_gradient(model: PreTrainedModel, spec: str) -> None:
    """A padded batch: the weighted mean of what its rows give alone."""
    ids = tokens(2, 50)
    ids[1, 31:] = 0
    mask = (ids > 0).long()
    with saccade.attach(model, prefill=spec):
        both = gradients(model, ids, attention_mask=mask, use_cache=False)
        alone = [gradients(model, row, use_cache=False) for row in (ids[:1], ids[1:, :31])]
    assert same(both, [(49 * a + 30 * b) / 79 for a, b in zip(*alone, strict=True)])
