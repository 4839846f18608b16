"""The sets: each checked against its definition, solved by an oracle that reads only what a model may read."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.pocket.tokenizer import BOS
from saccade.train.sets import IGNORE, SETS, ByteText, Needles, Recall, Regression, SelectiveCopy, StateTracking, TokenSet, build_set
from saccade.train.sets.tracking import product_table


def draw(source: TokenSet, batch: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    return source.sample(torch.Generator().manual_seed(seed), batch)


def certain(source: TokenSet, answers: Tensor) -> Tensor:
    """Logits of a model that gives these answers `(B, N)`."""
    return 20.0 * F.one_hot(answers.clamp(min=0), source.vocabulary).float()


def measured(source: TokenSet, logits: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    return {name: (part / count).item() for name, (part, count) in source.score(logits, tokens, targets).items()}


@pytest.fixture
def made(sources: Path) -> dict[str, TokenSet]:
    return {
        "mqar": Recall(length=64, pairs=8, vocab=64),
        "selective-copy": SelectiveCopy(length=32, items=5),
        "state-tracking": StateTracking(group="s3", length=12),
        "regression": Regression(dims=2, points=12),
        "needles": Needles(length=400, folder=sources, megabytes=1.0),
        "bytes": ByteText(folder=sources, length=64),
    }


@pytest.mark.parametrize("name", SETS)
def test_what_every_set_promises(made: dict[str, TokenSet], name: str) -> None:
    source = made[name]
    tokens, targets = draw(source)
    assert tokens.shape == targets.shape == (6, source.context) and tokens.dtype == targets.dtype == torch.int64
    asked = targets != IGNORE
    assert bool(asked.any(1).all()) and int(tokens.min()) >= 0 and int(tokens.max()) < source.vocabulary
    assert int(targets[asked].min()) >= 0 and int(targets[asked].max()) < source.vocabulary
    again, other = draw(source), draw(source, seed=1)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], targets) and not torch.equal(other[0], tokens)
    assert measured(source, certain(source, targets), tokens, targets)["accuracy"] == 1.0
    assert measured(source, certain(source, (targets + 1) % source.vocabulary), tokens, targets)["accuracy"] < 0.5
    whole = source.rows(0, "train", 3, 6, 0, 6)
    parts = [source.rows(0, "train", 3, 6, first, first + 2) for first in (0, 2, 4)]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


@pytest.mark.parametrize("fewest", [None, 2])
def test_recall_is_answered_by_a_dictionary(fewest: int | None) -> None:
    source = Recall(length=256, pairs=32, fewest=fewest, vocab=512)
    counts = set()
    for seed in range(6):
        tokens, targets = draw(source, seed=seed)
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            spots = [i for i, target in enumerate(wanted) if target != IGNORE]
            n = len(spots)
            counts.add(n)
            held = dict(zip(row[0 : 2 * n : 2], row[1 : 2 * n : 2], strict=True))
            assert len(held) == n and max(held) < 256 <= min(held.values())
            assert all(spot >= 2 * n and held[row[spot]] == wanted[spot] for spot in spots)
            fillers = [token for i, token in enumerate(row) if i >= 2 * n and i not in spots]
            assert min(fillers) >= 256  # no filler binds a key anew
    assert counts == {32} if fewest is None else len(counts) > 2


def test_gaps_of_recall_follow_the_power_law() -> None:
    """With one pair the gap is a single draw: small gaps must be as frequent as p(gap) = gap^(a - 1) / sum says."""
    source = Recall(length=42, pairs=1, vocab=16, power=0.01)
    _, targets = draw(source, batch=20_000)
    gaps = (targets != IGNORE).int().argmax(1) // 2  # the first place after the pair is gap 1
    share = torch.bincount(gaps, minlength=21)[1:].double() / 20_000
    law = torch.arange(1, 21, dtype=torch.float64) ** -0.99
    assert torch.allclose(share, law / law.sum(), atol=0.012)


def test_selective_copy_keeps_the_order() -> None:
    source = SelectiveCopy(length=40, items=6, vocab=9)
    tokens, targets = draw(source, batch=40)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert [token for token in row[:40] if token >= 2] == wanted[40:] and row[40:] == [1] * 6
        assert wanted[:40] == [IGNORE] * 40
    assert len({tuple(row.nonzero().flatten().tolist()) for row in tokens}) > 30  # items stand anywhere


@pytest.mark.parametrize(("group", "size"), [("parity", 2), ("s3", 3), ("s5", 5)])
def test_state_tracking_is_the_running_product(group: Any, size: int) -> None:
    source = StateTracking(group=group, length=20)
    elements = list(permutations(range(size)))
    tokens, targets = draw(source, batch=4)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        objects = list(range(size))
        for token, target in zip(row, wanted, strict=True):
            objects = [elements[token][x] for x in objects]  # where each object is after this permutation
            assert tuple(objects) == elements[target]
    table = product_table(group)
    assert torch.equal(table[0], torch.arange(len(table))) and torch.equal(table[:, 0], torch.arange(len(table)))
    assert (torch.equal(table, table.T)) == (group == "parity")
    answers = targets.clone()
    answers[:, -1] = (answers[:, -1] + 1) % source.vocabulary
    found = measured(source, certain(source, answers), tokens, targets)
    assert found["last"] == 0.0 and found["accuracy"] == pytest.approx(19 / 20)


def test_regression_is_solved_by_least_squares() -> None:
    exact = Regression(dims=3, points=20, bins=256)
    tokens, targets = draw(exact, batch=50)
    right = measured(exact, certain(exact, targets), tokens, targets)
    assert right["error"] < 1e-6 and right["least squares"] < 0.02  # what is left comes from the bins
    zero = measured(exact, torch.zeros(*tokens.shape, exact.vocabulary), tokens, targets)
    assert zero["error"] == pytest.approx(1.0, abs=0.02)
    noisy = Regression(dims=3, points=20, bins=256, noise=0.5)
    assert measured(noisy, certain(noisy, targets), *draw(noisy, batch=50))["least squares"] > 0.1
    values = targets[targets != IGNORE]
    assert int(values.min()) >= 256 and (targets != IGNORE).sum(1).tolist() == [20] * 50
    y = exact.centres()[values - 256]
    assert y.mean().item() == pytest.approx(0, abs=0.1) and y.square().mean().item() == pytest.approx(1.0, abs=0.25)


def test_needles_ask_for_what_the_text_says(sources: Path) -> None:
    source = Needles(length=600, count=2, asked=1, folder=sources, megabytes=1.0)
    tokenizer = source.tokenizer()
    tokens, targets = draw(source, batch=4)
    for row, wanted in zip(tokens, targets, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        answer = tokenizer.decode(wanted[wanted != IGNORE])
        assert "Question: What is the" in text and text.count(f"is {answer}") >= 1 and len(answer) >= 3
    _, plain = draw(Needles(length=600, count=2, asked=1, plain=True, folder=sources, megabytes=1.0), batch=4)
    assert (plain != IGNORE).sum() > 10 * (targets != IGNORE).sum()


def test_bytes_come_in_epochs_and_keep_some_for_evaluation(tmp_path: Path) -> None:
    rng = Random(0)
    for name in ("b.txt", "a.txt", "inner/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(rng.randrange(256) for _ in range(700)))
    (tmp_path / ".hidden").write_text("x" * 500)
    source = ByteText(folder=tmp_path, length=50, held_out=0.1)
    text = b"\n".join((tmp_path / name).read_bytes() for name in ("a.txt", "b.txt", "inner/c.txt"))
    assert bytes(source.text.tolist()) == text and source.windows == 42 and source.training_windows == 38

    def window(targets: Tensor) -> int:
        found = text.index(bytes((targets - 3).tolist()))
        assert found % 50 == 0
        return found // 50

    order = []
    for number in range(8):
        tokens, targets = source.rows(5, "train", number, 10, 0, 10)
        assert bool((tokens[:, 0] == BOS).all()) and torch.equal(tokens[:, 1:], targets[:, :-1])
        order += [window(row) for row in targets]
    assert sorted(order[:38]) == sorted(order[38:76]) == list(range(38)) and order[:38] != order[38:76]
    held = [window(row) for number in range(2) for row in source.rows(5, "evaluate", number, 3, 0, 3)[1]]
    assert held == [38, 39, 40, 41, 38, 39]
    uniform = measured(source, torch.zeros(10, 50, 320), tokens, targets)
    assert uniform["bits"] == pytest.approx(torch.tensor(320.0).log2().item())
    assert ByteText(folder=tmp_path, length=50, endings=(".py", ".txt")).fingerprint() == source.fingerprint()


@pytest.mark.parametrize(("given", "message"), [
    ({}, "data names no set"),
    ({"set": "mqar", "pairs": 0}, "pairs is 0"),
    ({"set": "mqar", "pairs": 8, "length": 64, "vocab": 16}, "vocab is 16, expected more than 17"),
    ({"set": "mqar", "fewest": 33}, "fewest is 33, expected 1 to 32"),
    ({"set": "selective-copy", "items": 300}, "items is 300, expected 1 to 256"),
    ({"set": "state-tracking", "group": "s6"}, "data.group is 's6', expected one of parity, s3, s4, s5"),
    ({"set": "regression", "bins": 1}, "bins is 1"),
    ({"set": "needles", "length": 100}, "length is 100, expected at least 304"),
    ({"set": "bytes"}, "data lacks folder: add it"),
    ({"set": "bytes", "folder": "/nowhere/at/all"}, "the folder /nowhere/at/all does not exist"),
])  # fmt: skip
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_set(given)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few bytes")
    with pytest.raises(ValueError, match="holds 11 bytes to read, expected at least two windows of 512"):
        build_set({"set": "bytes", "folder": str(tmp_path)})
