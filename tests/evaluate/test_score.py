"""Scores on cases worked by hand, intervals against published values."""

from __future__ import annotations

import math
from random import Random

import pytest

from saccade.evaluate.score import (
    bits_per_byte,
    bootstrap,
    bytes_right,
    discriminating,
    exact,
    recall,
    summary,
    wilson,
)


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        (b"1234", b"1234", True),
        (b"  1234.\nQuestion", b"1234", True),
        (b"12345", b"1234", False),
        (b"1234_", b"1234", False),
        (b"123", b"1234", False),
        (b"the 1234", b"1234", False),
        (b"blue bird", b"blue bird", True),
        (b"blue birds", b"blue bird", False),
        (b"", b"1234", False),
    ],
)
def test_exact(output: bytes, answer: bytes, right: bool) -> None:
    assert exact(output, answer) is right


@pytest.mark.parametrize(
    ("output", "share"),
    [
        (b"abcdefgh", 1.0),
        (b"abcdefgh and more", 1.0),
        (b"abXdefgh", 7 / 8),
        (b"abdefgh", 7 / 8),
        (b"abcdXefgh", 7 / 8),
        (b"abcd", 0.5),
        (b"", 0.0),
        (b"zzzzzzzzzzzzzzzz", 0.0),
    ],
)
def test_bytes_right_counts_edits_not_places(output: bytes, share: float) -> None:
    assert bytes_right(output, b"abcdefgh") == pytest.approx(share)


def test_bytes_right_is_symmetric_to_a_plain_edit_distance() -> None:
    def distance(a: bytes, b: bytes) -> int:
        if not a or not b:
            return len(a) + len(b)
        same = distance(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    rng = Random(0)
    for _ in range(30):
        output, answer = (bytes(rng.choices(b"ab", k=rng.randint(1, 5))) for _ in range(2))
        fewest = min(distance(output[:n], answer) for n in range(len(output) + 1))
        assert bytes_right(output, answer) == pytest.approx(max(0, 1 - fewest / len(answer)))


def test_recall_wants_whole_words_in_any_order() -> None:
    assert recall(b"beta, alpha.", [b"alpha", b"beta", b"gamma", b"delta"]) == 0.5
    assert recall(b"alphabet", [b"alpha"]) == 0.0
    assert recall(b"alphabet alpha", [b"alpha"]) == 1.0


def test_bits_per_byte_of_a_uniform_guess_is_eight() -> None:
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)


# Newcombe (1998), Statistics in Medicine 17, table I, method 3
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_contains_its_share_and_narrows() -> None:
    for n in (1, 3, 8, 50):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1
    assert wilson(50, 100)[1] - wilson(50, 100)[0] < wilson(5, 10)[1] - wilson(5, 10)[0]


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    rng = Random(1)
    values = [rng.gauss(3.0, 1.0) for _ in range(200)]
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values) != bootstrap(values, seed=1)
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
    # 1000 resamples place a 2.5% quantile of a normal law within about 4 of its standard errors, 0.09 half widths each
    assert low == pytest.approx(mean - half, abs=0.2 * half)
    assert high == pytest.approx(mean + half, abs=0.2 * half)
    assert bootstrap([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


def test_summary_uses_wilson_for_right_or_wrong_and_the_bootstrap_otherwise() -> None:
    assert summary([1.0, 1.0, 0.0, 1.0]) == (0.75, *wilson(3, 4))
    assert summary([0.5, 1.0, 0.25]) == (pytest.approx(7 / 12), *bootstrap([0.5, 1.0, 0.25]))
    assert summary([1.0, 1.0], bounded=False) == (1.0, 1.0, 1.0), "bits are no proportion"
    with pytest.raises(ValueError, match="at least one sample"):
        summary([])


def test_discriminating_wants_dense_half_way_from_guessing_to_perfect() -> None:
    assert discriminating(0.5, "accuracy") and not discriminating(0.49, "accuracy")
    assert discriminating(0.75, "accuracy", chance=0.5) and not discriminating(0.7, "accuracy", chance=0.5)
    assert discriminating(9.0, "bits") and not discriminating(None, "accuracy")
