"""One paper, one file. A method is found through its row in the catalogue and loaded when it is first named."""

from __future__ import annotations

from importlib import import_module

from saccade.catalog import catalog, nearest
from saccade.core import REGISTRY, Method, parse_spec, split_top_level

__all__ = ["build", "build_combination", "load", "load_all"]


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
    """A Method from a spec such as `"snapkv(budget=0.25)"`; a Method is returned as it is."""
    if isinstance(method, Method):
        return method
    slug, given = parse_spec(method)
    return load(slug).from_fields(given)


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
    return methods
