"""Sizes of patterns: a number of tokens, or a share of the prompt."""

from __future__ import annotations

from saccade.core import Budget


def check_size(slug: str, name: str, size: object) -> None:
    """ValueError unless `size` is an int >= 1 (tokens) or a float in (0, 1] (a share of the prompt)."""
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if not whole and not (isinstance(size, float) and 0 < size <= 1):
        raise ValueError(f"{slug}({name}={size!r}) is neither a whole number of tokens from 1 on nor a share of the prompt in (0, 1]")


def resolve(size: int | float, n: int) -> int:
    """Tokens of a checked size in a prompt of n: at least 1, at most n; a share rounds up."""
    return Budget.of(size).tokens(n)
