"""Several cache policies on one cache, one after another: `"snapkv(budget=0.3)|zipcache"`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from saccade.cache.state import Scope
from saccade.core import CachePolicy, Info, LayerContext, Method, StoredKV


@dataclass(frozen=True, kw_only=True)
class Chain(CachePolicy):
    """Each policy acts on what the one before left in full precision; each has its own state and its own plan.

    After a decoding step the policies that are due act, in order. Raises ValueError when one can't work on what the one before leaves.
    """

    policies: tuple[CachePolicy, ...]

    def __post_init__(self) -> None:
        for first, second in zip(self.policies, self.policies[1:], strict=False):
            if first.info.encodes:
                raise ValueError(f"{first.info.slug} encodes all that is there, so nothing is left for {second.info.slug}: put it last")
            if first.info.ragged and second.info.encodes:
                raise ValueError(
                    f"{second.info.slug} encodes heads that hold equally many entries, which {first.info.slug} does not leave: "
                    "use an eviction that keeps the same number in every head"
                )

    @property
    def info(self) -> Info:  # pyright: ignore[reportIncompatibleVariableOverride]
        parts = [policy.info for policy in self.policies]
        return Info(
            slug="|".join(part.slug for part in parts), phase="cache", needs=frozenset().union(*(part.needs for part in parts)),
            frees_memory=any(part.frees_memory for part in parts), append_only=all(part.append_only for part in parts),
            encodes=any(part.encodes for part in parts), ragged=any(part.ragged for part in parts),
        )  # fmt: skip

    @property
    def spec(self) -> str:
        return "|".join(policy.spec for policy in self.policies)

    @property
    def members(self) -> tuple[Method, ...]:
        return self.policies

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        for index, policy in enumerate(self.policies):
            policy.watch(self._inside(ctx, index), kv, q)

    def due(self, ctx: LayerContext, length: int) -> bool:
        due = [policy.due(self._inside(ctx, index), length) for index, policy in enumerate(self.policies)]
        # compress comes next, and is to know which of them asked for it
        ctx.state["due"] = due if any(due) else None
        return any(due)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        due = ctx.state.pop("due", None) or [True] * len(self.policies)
        for index, policy in enumerate(self.policies):
            if due[index] and kv.length:
                policy.compress(self._inside(ctx, index), kv)

    def _inside(self, ctx: LayerContext, index: int) -> LayerContext:
        """The context of one policy: its own part of the state."""
        name = f"policy {index}"
        state, sequence = (owner.setdefault(name, Scope()) for owner in (ctx.state, ctx.sequence))
        return replace(ctx.inside(self.policies[index].info.slug), state=state, sequence=sequence)
