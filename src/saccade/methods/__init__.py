"""One paper, one file. A method is found through its row in the catalogue and loaded when it is first named."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from saccade.catalog import catalog, nearest
from saccade.core import REGISTRY, CachePolicy, Method, parse_spec, split_top_level

__all__ = ["build", "build_combination", "complete", "joined", "load", "load_all"]


def load(slug: str) -> type[Method]:
    """The class of a method; ValueError when it is unknown (with the nearest names) or only planned."""
    if slug not in REGISTRY:
        row = catalog().get(slug)
        if row is None:
            near = nearest(slug)
            hint = f"did you mean {', '.join(near)}?" if near else "`saccade list` shows all"
            raise ValueError(f"there is no method {slug!r}: {hint}")
        if row.status != "done" or not row.module:
            raise ValueError(f"{slug} is planned but not built yet: `saccade list --status done` shows what runs")
        import_module(row.module)
    return REGISTRY[slug]


def load_all() -> dict[str, type[Method]]:
    """Every built method by slug."""
    return {row.slug: load(row.slug) for row in catalog().values() if row.status == "done"}


def build(method: str | Method) -> Method:
    """A Method from a spec such as `"snapkv(budget=0.25)"`, or cache policies in a row from `"snapkv(budget=0.25)|zipcache"`.

    A Method is returned as it is.
    """
    if isinstance(method, Method):
        return method
    if len(parts := split_top_level(method, "|")) > 1:
        return joined([build(part) for part in parts])
    slug, given = parse_spec(method)
    return load(slug).from_fields(given)


def joined(policies: Sequence[Method]) -> Method:
    """Cache policies as one that lets them act one after another; ValueError for methods of other kinds."""
    from saccade.methods.chain import Chain

    for policy in policies:
        if not isinstance(policy, CachePolicy):
            raise ValueError(f"{policy.info.slug} acts on the {policy.info.phase} phase: only cache policies are joined by |")
    return Chain(policies=tuple(member for policy in policies for member in policy.members))  # pyright: ignore[reportArgumentType]


def build_combination(text: str) -> dict[str, Method]:
    """`"minference+snapkv(budget=0.25)"` to methods by phase ("prefill", "decode", "cache"); dense parts are left out."""
    methods: dict[str, Method] = {}
    for spec in split_top_level(text, "+"):
        if spec == "dense":
            continue
        method = build(spec)
        phase = method.info.phase
        if phase in methods:
            raise ValueError(f"{text!r} names two {phase} methods, {methods[phase].info.slug} and {method.info.slug}: use one of them")
        methods[phase] = method
    return complete(methods)


def complete(methods: dict[str, Method]) -> dict[str, Method]:
    """The methods by phase, with those filled in that act in further phases and must; ValueError where such a phase is taken."""
    filled = dict(methods)
    for method in methods.values():
        for phase in sorted(method.info.also):
            other = filled.setdefault(phase, method)
            if other != method:
                raise ValueError(f"{method.info.slug} acts on the {phase} phase too, which {other.info.slug} was given: use one of them")
    return filled
