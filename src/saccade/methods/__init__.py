"""One paper, one file. A method is found through its row in the catalogue and loaded when it is first named."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from saccade.catalog import catalog, nearest
from saccade.core import REGISTRY, CachePolicy, Method, Mixer, MixerShape, TokenMixer, parse_spec, split_top_level

__all__ = ["build", "build_combination", "build_mixer", "complete", "joined", "load", "load_all", "mixer"]


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


def build_mixer(spec: str | Mixer) -> Mixer:
    """A Mixer from a spec such as `"deltanet(conv=3)"`, or several that run side by side from `"softmax(window=64) & deltanet"`.

    ValueError for methods of other kinds.
    """
    if isinstance(spec, str) and len(parts := split_top_level(spec, "&")) > 1:
        from saccade.methods.parallel import Parallel

        return Parallel(branches=tuple(build_mixer(part) for part in parts))
    method = build(spec)
    if not isinstance(method, Mixer):
        raise ValueError(
            f"{method.info.slug} acts on the {method.info.phase} phase of a trained model and is no mixer: `saccade.attach` takes it"
        )
    return method


def mixer(
    spec: str | Mixer, *, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, layer: int = 0, layers: int = 1,
    max_length: int | None = None,
) -> TokenMixer:  # fmt: skip
    """A trainable layer over tokens `(B, N, dim)`: `mixer("deltanet", dim=1024, heads=8)`.

    spec: a mixer by name with its fields; several joined by & run side by side on the same tokens. kv_heads: key/value heads (default:
    heads). head_dim: channels of a head (default: dim / heads). layer, layers: where it stands, for what changes with depth. max_length:
    for methods whose parameters have one row per position.
    `y, state = layer(x)` and `y, state = layer(next_x, state)`; see `saccade.core.TokenMixer`. Raises ValueError for unknown names, for
    methods that are no mixers and for sizes that don't fit.
    """
    shape = MixerShape(
        dim=dim, heads=heads, kv_heads=kv_heads or 0, head_dim=head_dim or 0, layer=layer, layers=layers, max_length=max_length
    )
    return build_mixer(spec).module(shape)


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
