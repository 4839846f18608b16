"""sha-rnn: carried memory, the folded vector, and what attention adds to an LSTM."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import saccade


def layer(spec: str, dim: int = 16, **sizes: int):
    torch.manual_seed(0)
    made = saccade.mixer(spec, dim=dim, heads=1, **sizes).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return made


@torch.no_grad()
def test_two_segments_with_carried_memory_equal_one():
    """While the memory holds all tokens, feeding two segments equals feeding the sequence as one; with a short memory it does not."""
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    one = layer("sha-rnn(attend='all', segment=40, memory=0, dropout=0)")(x)[0]
    for memory, same in ((20, True), (19, False), (0, False)):
        mixer = layer(f"sha-rnn(attend='all', segment=20, memory={memory}, dropout=0)")
        first, state = mixer(x[:, :20])
        second = mixer(x[:, 20:], state.detach())[0]
        assert (torch.cat([first, second], 1) - one).abs().max() < 1e-12 if same else (second - one[:, 20:]).abs().max() > 1e-6


@torch.no_grad()
def test_the_vector_of_the_values_can_be_folded():
    mixer, x = layer("sha-rnn(attend='all', dropout=0)"), torch.randn(2, 30, 16, dtype=torch.float64)
    y, parameters = mixer(x)[0], sum(p.numel() for p in mixer.parameters())
    mixer.fold()
    assert torch.equal(mixer(x)[0], y)
    assert parameters - sum(p.numel() for p in mixer.parameters()) == 16 + 16 * 32 + 32 - 16


def recall_loss(attend: str) -> float:
    """Cross-entropy of 12 symbols shown at their places, asked for after a delay, in an order of their own."""
    torch.manual_seed(1)
    dim, places, symbols = 24, 12, 8
    mixer = saccade.mixer(f"sha-rnn(attend={attend!r}, dropout=0)", dim=dim, heads=1).double()
    where, what = (torch.nn.Embedding(n, dim).double() for n in (places, symbols + 1))
    head = torch.nn.Linear(dim, symbols).double()
    weights = [*mixer.parameters(), *where.parameters(), *what.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(weights, lr=2e-2)
    losses = []
    for _ in range(100):
        seen = torch.randint(symbols, (16, places))
        order = torch.stack([torch.randperm(places) for _ in range(16)])
        show = where.weight + what(seen)
        delay = what.weight[symbols].expand(16, 6, -1)
        ask = where(order) + what.weight[symbols]
        y = mixer(torch.cat([show, delay, ask], 1), keep=False)[0][:, -places:]
        loss = F.cross_entropy(head(y).flatten(0, 1), seen.gather(1, order).flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_attention_copies_what_the_lstm_cannot_hold():
    with_attention, without = recall_loss("all"), recall_loss("none")
    assert with_attention < 0.6 * without, (with_attention, without)


def test_attention_stands_in_the_second_last_layer_alone():
    has = [saccade.mixer("sha-rnn", dim=16, heads=1, layer=i, layers=4).attends for i in range(4)]
    assert has == [False, False, True, False]
    assert saccade.mixer("sha-rnn", dim=16, heads=1).attends


@torch.no_grad()
def test_values_and_keys_are_the_stored_tokens():
    """No matrix acts on keys or values: with a query of 0 and a vector of ones, attention is the mean of the stored tokens."""
    mixer = layer("sha-rnn(attend='all', dropout=0)")
    mixer.fold()
    mixer.v_gate.value.data.fill_(1)
    stored = torch.randn(1, 7, 16, dtype=torch.float64)
    out = mixer.read(torch.zeros_like(stored), stored, torch.ones(7, 7, dtype=torch.bool).tril())
    assert (out[0, 4] - stored[0, :5].mean(0)).abs().max() < 1e-12


def test_boom_adds_the_pieces():
    mixer = layer("sha-rnn(attend='none', boom=3, dropout=0)")
    h = torch.randn(1, 2, 16, dtype=torch.float64)
    u = mixer.boom(mixer.feed_in_norm(h))
    u = u * torch.sigmoid(1.702 * u)
    assert (mixer.feed(h) - mixer.feed_norm(h) - u[..., :16] - u[..., 16:32] - u[..., 32:]).abs().max() < 1e-12


def test_dropout_acts_in_training_alone():
    mixer, x = saccade.mixer("sha-rnn", dim=16, heads=1), torch.randn(1, 9, 16)
    assert not torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.eval()
    assert torch.equal(mixer(x)[0], mixer(x)[0])


@pytest.mark.parametrize("fields", ["attend='first'", "memory=-1", "segment=0", "wide=0", "boom=0", "dropout=1"])
def test_wrong_fields_are_refused(fields: str):
    with pytest.raises(ValueError, match=fields.split("=")[0]):
        saccade.mixer(f"sha-rnn({fields})", dim=16, heads=1)
