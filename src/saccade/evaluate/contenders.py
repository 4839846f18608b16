"""What is compared: methods and their combinations, the dense ceiling and the random-eviction floor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from saccade.core import Budget, CachePolicy, Mass, Method, Plan, Threshold, format_spec, parse_spec, split_top_level
from saccade.methods import build_combination

FLOOR_BUDGET = 0.25


@dataclass(frozen=True)
class Contender:
    """One line of a comparison.

    spec: the method as it was named, spaces normalised. slug: the same without arguments. methods: by phase; none for
    dense attention, which is run on the model as it is. plans, note, broken: filled in by calibration.
    """

    spec: str
    slug: str
    methods: dict[str, Method]
    plans: list[Plan] = field(default_factory=list)
    note: str | None = None
    broken: str | None = None

    @property
    def dense(self) -> bool:
        return not self.methods

    @property
    def members(self) -> list[Method]:
        """Every method in it once: those of a chain, and one that acts in several phases."""
        return list({id(one): one for method in self.methods.values() for one in method.members}.values())

    @property
    def evicts(self) -> bool:
        """Whether a part of it acts on the cache or reads only some of it, so that random eviction is its floor."""
        return "cache" in self.methods or "decode" in self.methods


def contender(text: str) -> Contender:
    """A Contender from `"minference+snapkv(budget=0.25)"` or `"dense"`.

    Raises ValueError for unknown methods and settings, and for two methods of one phase.
    """
    methods = build_combination(text)
    if not methods:
        return Contender("dense", "dense", {})
    # a phase's cache policies may stand in a row, joined by |
    named = [[parse_spec(one) for one in split_top_level(part, "|")] for part in split_top_level(text, "+") if part != "dense"]
    spec = "+".join("|".join(format_spec(slug, settings) for slug, settings in row) for row in named)
    return Contender(spec, "+".join("|".join(slug for slug, _ in row) for row in named), methods)


def line_up(specs: Sequence[str], lengths: Sequence[int], *, floor: bool = True) -> list[Contender]:
    """The contenders of a run: dense first, then the floor, then `specs` in their order, each once.

    The floor `random(budget=b)` joins when some method works on the cache; b is the smallest budget of the cache
    policies (0.25 if none has a fixed one). It stays out with `floor=False` or when a `random` is named already.
    """
    if not specs:
        raise ValueError("no methods were given: name at least one, such as 'snapkv(budget=0.25)'")
    named: dict[tuple[Any, ...], Contender] = {}
    for text in specs:
        found = contender(text)
        named.setdefault(tuple(sorted((phase, method.spec) for phase, method in found.methods.items())), found)
    rest = [found for found in named.values() if not found.dense]
    line = [contender("dense")]
    if floor and any(found.evicts for found in rest) and not any(found.slug == "random" for found in rest):
        line.append(contender(format_spec("random", {"budget": _smallest_budget(rest, min(lengths))})))
    return line + rest


def _smallest_budget(contenders: Iterable[Contender], length: int) -> float | int:
    amounts: list[float | int] = []
    for found in contenders:
        policy = found.methods.get("cache")
        if isinstance(policy, CachePolicy):
            amount = getattr(policy, "budget", None)
            amount = amount.amount if isinstance(amount, Budget) else amount
            if isinstance(amount, int | float) and not isinstance(amount, bool | Mass | Threshold):
                amounts.append(amount)
    return min(amounts, key=lambda amount: Budget.of(amount).tokens(length), default=FLOOR_BUDGET)


def split_methods(text: str) -> list[str]:
    """The specs in a list separated by semicolons or commas; those inside brackets belong to a spec."""
    return [spec for part in split_top_level(text, ";") for spec in split_top_level(part, ",")]
