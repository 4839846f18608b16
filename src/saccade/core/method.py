"""Kinds of methods: a frozen dataclass of hyper-parameters and the few hooks its kind needs."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor

from saccade.core.context import LayerContext, Phase
from saccade.core.plan import Plan
from saccade.core.selection import Selection
from saccade.core.spec import format_spec

LayerPolicy = Literal["dense", "select"] | int
T = TypeVar("T", bound="type[Method]")


@dataclass(frozen=True, kw_only=True)
class Info:
    """Facts about a method, from which listings, errors and the contract matrix are made.

    phase: where it acts. also: other phases in which it must act too, which its name alone fills.
    needs: of "queries", "weights" (attention probabilities), "hidden" (the layers' inputs), "calibration", "training".
    encodes: whether it stores entries in another form than full precision. reads_encoded: of a decode method, whether it works where a
    cache policy has encoded entries: it chooses by its own index or by `ctx.entries`, and reads what it chose through `ctx.attend`.
    recordable: of a decode method, whether its steps may be recorded as a CUDA graph: what a step does depends on the query, the entries
    and the index alone, it asks the device for no number, and calls `ctx.attend` once.
    ragged: whether it leaves heads with different numbers of entries. frees_memory: whether the KV cache becomes smaller. append_only:
    whether it works on pages that are only appended to.
    causality: "causal", "streaming" or "bidirectional". opened: the fields with which it equals dense attention.
    tiny: fields for short test sequences. variants: further settings that the mixers' contract tries. opts_out: contract
    axis to the reason why it does not hold for this method.
    """

    slug: str
    phase: Phase
    also: frozenset[Phase] = frozenset()
    needs: frozenset[str] = frozenset()
    frees_memory: bool = False
    append_only: bool = True
    encodes: bool = False
    reads_encoded: bool = False
    recordable: bool = False
    ragged: bool = False
    causality: Literal["causal", "streaming", "bidirectional"] = "causal"
    opened: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[Mapping[str, Any]] = ()
    opts_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyper-parameters only; all state of a run lives in the LayerContext or the cache layer."""

    info: ClassVar[Info]

    @property
    def spec(self) -> str:
        """The string that builds this method again: the slug and the fields that differ from their defaults."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return format_spec(self.info.slug, changed)

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods this one is made of: itself, unless it is a chain."""
        return (self,)

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> Method:
        """Build from named fields; ValueError for unknown names (with the nearest) and values out of range."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
                raise ValueError(f"{cls.info.slug} has no field {name!r}: did you mean {', '.join(near)}?")
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"{cls.info.slug} can't be built from {dict(given)}: {error}") from None


class Prefill(Method):
    """Chooses, for many queries at once, which keys they read."""

    @abstractmethod
    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """Selection for q `(B, Hq, Nq, D)` over k, v `(B, Hk, Nk, D)`; the queries are the last Nq of the Nk positions."""

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output `(B, Hq, Nq, Dv)`. Override only where "select, then attend" is not the method."""
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))


class PromptReduction(Method):
    """Makes the prompt itself shorter: an early layer chooses tokens, and the model runs on these alone. Takes the place of a prefill
    method; the cache then holds the chosen tokens only."""

    @abstractmethod
    def layer(self, layers: int) -> int:
        """The layer that chooses, of so many."""

    @abstractmethod
    def size(self, n: int) -> int:
        """Tokens that stay of a prompt of n; n or more: all."""

    @abstractmethod
    def choose(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        """The tokens of a prompt that stay, int64 `(B, m)` ascending, the last one among them: q `(B, Hq, n, D)`, k `(B, Hk, n, D)`."""


class Decode(Method):
    """Chooses, for one query at a time, which part of a long cache it reads. Nothing is dropped."""

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        """Bring the index up to date with newly stored keys and values `(B, Hk, m, D)` in slots start ... start + m - 1.

        The default does nothing: for methods without an index.
        """

    @abstractmethod
    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """Selection for q `(B, Hq, 1, D)` over all entries the layer holds, k, v `(B, Hk, n, D)`, which were observed before.

        Where entries lie encoded (`ctx.entries`), k and v tell shapes only; they were observed as attention reads them.
        """

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output `(B, Hq, 1, Dv)`. Override only where "select, then attend" is not the method."""
        selection = self.select(ctx, q, k, v)
        ctx.publish(selection)
        return ctx.attend(q, k, v, selection)

    def rewind(self, ctx: LayerContext, n: int) -> int:
        """After tokens were taken back: shrink the index to at most the first n slots and return how many it still covers.

        The slots after that are observed again. The default forgets the index.
        """
        ctx.state.clear()
        return 0

    def layer_policy(self, layer: int, layers: int) -> LayerPolicy:
        """"dense", "select" (the layer calls `attend`), or the number of an earlier layer whose published selection is read again."""
        return "select"


class StoredKV(Protocol):
    """The entries of one cache layer as a cache policy sees them: same slots in every tensor, oldest first.

    keys `(B, Hk, n, D)`, values `(B, Hk, n, Dv)` as attention sees them; heads: how many heads are stored (Hk, or 1 where a
    model stores one latent for all); side: per-slot arrays `(B, heads, n)` that follow the entries ("positions" is always there;
    "log_weight", where a policy sets it, is added to the logits of entries that stand for several tokens);
    counted: the segment that stands for dropped tokens, None without one, to be replaced (`saccade.cache.counted`).
    """

    keys: Tensor
    values: Tensor
    side: dict[str, Tensor]
    counted: Any

    @property
    def heads(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def valid(self) -> Tensor | None:
        """bool `(B, heads, n)` where heads hold different numbers of entries (the gaps stand at the end), else None."""

    def keep(self, indices: Tensor, counts: Tensor | None = None) -> None:
        """Keep only these slots, `indices (B, heads, m)` int64 ascending; `counts (B, heads)` when heads keep different numbers."""

    def drop(self, begin: int, count: int) -> None:
        """Drop the slots begin ... begin + count - 1 of every head, where heads hold equally many; cheap if `begin` is small."""

    def rewrite(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Replace the stored keys, or values, or both by others of the same shape (merged, or turned to other positions)."""

    def write(self, begin: int, keys: Tensor | None = None, values: Tensor | None = None, side: dict[str, int] | None = None) -> None:
        """The same for the slots from `begin` on that `keys` and `values` hold; side: numbers for these slots in side arrays."""

    def seal(self, segment: Any, n: int) -> None:
        """Replace the n oldest entries by an encoded segment."""


class CachePolicy(Method):
    """Makes the stored cache smaller: drops, merges or re-encodes entries."""

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        """After each attention call: q `(B, Hq, m, D)` are its queries, whose own keys are the last m entries of kv."""

    @abstractmethod
    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        """When the prompt has ended, and after a decoding step for which `due` is true."""

    def due(self, ctx: LayerContext, length: int) -> bool:
        """Whether to compress after this decoding step, with `length` entries stored in full precision. Default: never."""
        return False


class Rebuilding(CachePolicy):
    """A cache policy that brings dropped tokens back: before a call, tokens it asks for run again, each at its own place, together with
    the new ones. What they leave in every layer is then kept or dropped like any other entry. All layers and heads hold the same tokens.

    A sequence's state, `ctx.sequence`, knows the tokens read so far: PLACES `(B, n)` int32, their places as in `kv.side["positions"]`.
    """

    PLACES: ClassVar[str] = "places read"

    @abstractmethod
    def recall(self, sequence: dict[str, Any], plan: Plan | None, x: Tensor, held: Tensor) -> Tensor:
        """Which tokens run again beside new ones with input embeddings x `(B, m, C)`: int64 `(B, r)` ascending, of those not `held`.

        held: bool `(B, n)`, which of the n tokens before are in the cache; n may be less than last time, where tokens were taken back.
        Called once before each call, the prompt's included.
        """


class Calibrated(Method):
    """A method with an offline part: statistics gathered over samples, and what is concluded from them."""

    def sample_ids(self, batch: Tensor, special: frozenset[int]) -> Tensor:
        """The token ids `(B', N')` that are run in place of a batch of text `(B, N)`: the text itself by default.

        special: ids of the model's special tokens.
        """
        return batch

    @abstractmethod
    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Statistics of one layer on one sample, from dense attention's q, k, v; they are summed over samples."""

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics so far (nothing at first) and those of one more sample together. The default adds them up."""
        return {name: sums[name] + value if name in sums else value for name, value in found.items()}

    @abstractmethod
    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plan's tensors for one layer from the summed statistics."""

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The plan's tensors of every layer from all layers' statistics. Override where layers are decided on together."""
        return {layer: self.conclude(found) for layer, found in sums.items()}


REGISTRY: dict[str, type[Method]] = {}


def register(cls: T) -> T:
    """Class decorator: make a method known under its slug, which must be new."""
    slug = cls.info.slug
    if slug in REGISTRY and REGISTRY[slug].__qualname__ != cls.__qualname__:
        raise ValueError(f"two methods are called {slug!r}: {REGISTRY[slug].__module__} and {cls.__module__}")
    REGISTRY[slug] = cls
    return cls
