"""Scores and their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

Z95 = 1.959963984540054
RESAMPLES = 1000


def exact(output: bytes, answer: bytes) -> bool:
    """Whether `output`, stripped of white space, begins with `answer` and the answer ends there.

    What follows may be punctuation or white space but no letter, digit or underscore: 1234 is not 12345.
    """
    output, answer = output.strip(), answer.strip()
    after = output[len(answer) : len(answer) + 1]
    return output.startswith(answer) and not (after.isalnum() or after == b"_")


def bytes_right(output: bytes, answer: bytes) -> float:
    """Share of the answer's bytes that `output` has right: 1 - edits / length, and 0 at least.

    The edits (insert, drop, change a byte) are the fewest that turn some beginning of `output` into the answer. Edits
    rather than places, because one dropped byte would otherwise make all that follow it wrong.
    """
    if not answer:
        raise ValueError("the answer is empty: byte accuracy needs at least one byte")
    row = list(range(len(answer) + 1))  # edits from the output read so far to each beginning of the answer
    fewest = row[-1]
    for i, byte in enumerate(output, start=1):
        previous, row = row, [i]
        for j, wanted in enumerate(answer, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (byte != wanted)))
        fewest = min(fewest, row[-1])
    return max(0.0, 1 - fewest / len(answer))


def recall(output: bytes, answers: Sequence[bytes]) -> float:
    """Share of `answers` that occur in `output` as whole words, in any order."""
    if not answers:
        raise ValueError("there are no answers: recall needs at least one")
    padded = b" " + output + b" "
    return sum(_occurs(padded, answer) for answer in answers) / len(answers)


def _occurs(text: bytes, answer: bytes) -> bool:
    at = text.find(answer)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(answer) : at + len(answer) + 1]
        if not any(edge.isalnum() or edge == b"_" for edge in (before, after)):
            return True
        at = text.find(answer, at + 1)
    return False


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed negative log-likelihood in nats over `n_bytes` bytes of text, as bits per byte."""
    if n_bytes < 1:
        raise ValueError(f"bits per byte over {n_bytes} bytes: at least one byte must be predicted")
    return nats / math.log(2) / n_bytes


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion: `successes` of `n` trials (n >= 1)."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: expected 0 <= successes <= trials and at least one trial")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The percentile bootstrap interval (2.5% to 97.5%) of the mean of `values`, from a seeded generator.

    A single value, or values that are all equal, give an interval of no width: more samples are needed there.
    """
    if not values:
        raise ValueError("no values: the bootstrap needs at least one score")
    rng = Random(seed)
    n = len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))
    low = means[int(0.025 * resamples)]
    high = means[min(resamples - 1, math.ceil(0.975 * resamples) - 1)]
    return low, high


def summary(values: Sequence[float], *, bounded: bool = True, seed: int = 0) -> tuple[float, float, float]:
    """`(mean, low, high)` of per-sample scores with a 95% interval.

    Scores that are all 0 or 1 get the Wilson interval (when `bounded`, that is: not bits); any others the bootstrap.
    """
    if not values:
        raise ValueError("no scores to average: run at least one sample")
    mean = sum(values) / len(values)
    if bounded and all(value in (0.0, 1.0) for value in values):
        return mean, *wilson(sum(values), len(values))
    return mean, *bootstrap(values, seed)


def discriminating(dense_score: float | None, unit: str, chance: float = 0.0) -> bool:
    """Whether a task can tell methods apart: dense attention is at least halfway from guessing (`chance`) to perfect.

    Without guessing that is a score of 0.5. Bits per byte always can. Without a dense score nothing is known, so False.
    """
    if unit == "bits":
        return True
    return dense_score is not None and dense_score >= (1 + chance) / 2
