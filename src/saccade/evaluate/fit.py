"""How much context fits: bytes of each method's cache, measured on real cache layers of a model's shape, and what that allows."""

from __future__ import annotations

import gc
import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from saccade import __version__
from saccade.attach.layers import LayerCall, LayerRunner
from saccade.attach.models import caches_latents, check_methods, layer_kinds, managed_layers, text_config
from saccade.cache import KVLayer
from saccade.core import HeadLayout, LayerContext, Plan, Prefill, Rotary, Selection
from saccade.core.method import Info
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.loading import DTYPES

SCHEMA = "saccade.fit/1"
SIZES = (2048, 3072, 4096)  # tokens whose bytes are measured; the third checks the line through the other two
CURVED = 0.03  # by how much it may be off
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Shape:
    """A model as its cache sees it.

    weights: bytes of its parameters. windows: tokens that its sliding-window layers hold, together; other kinds of layers that are
    left alone (linear, shared) count as nothing. positions: the tokens it was made for, None where its configuration doesn't say.
    """

    name: str
    layers: int
    managed: tuple[int, ...]
    layout: HeadLayout
    dtype: torch.dtype
    weights: int
    windows: int
    positions: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes in one managed layer of a plain cache."""
        return self.layout.kv_heads * (self.layout.head_dim + self.layout.value_dim) * self.dtype.itemsize


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "80 GB" or "1e10"; ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    try:
        amount = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    except (ValueError, KeyError):
        amount = 0
    if amount < 1:
        raise ValueError(f"memory {text!r} is no size: write it like 24GiB, 80GB or 512MiB")
    return int(amount)


def shape_of(name: str, *, dtype: str | None = None, offline: bool = False) -> tuple[Shape, PreTrainedModel]:
    """The shape of "pocket", of a saved model's folder, or of a model of the hub, and the model without weights.

    Only the configuration is read. ValueError when there is none, or when the model can't be attached.
    """
    if name == "pocket":
        from saccade.evaluate.loading import load_model

        config = load_model("pocket", device="cpu")[0].config
    else:
        path = Path(name).expanduser()
        try:
            config = AutoConfig.from_pretrained(str(path) if path.exists() else name, local_files_only=path.exists() or offline)
        except (OSError, ValueError) as error:
            raise ValueError(f"the configuration of {name!r} can't be read ({str(error).splitlines()[0][:150]}): check the name") from None
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    own = getattr(config, "dtype", None)
    kind = DTYPES[dtype] if dtype else own if isinstance(own, torch.dtype) else torch.bfloat16
    if caches_latents(model):
        raise ValueError(f"{type(model).__name__} caches latents, whose size fit does not know yet: measure it with `saccade compare`")
    text, managed = text_config(model), managed_layers(model)
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    layout = HeadLayout(query_heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim)
    parameters = {id(p): p.numel() for p in model.parameters()}
    sliding = sum(kind == "sliding_attention" for kind in layer_kinds(model))
    return Shape(
        name=name, layers=int(text.num_hidden_layers), managed=tuple(managed), layout=layout, dtype=kind,
        weights=sum(parameters.values()) * kind.itemsize, windows=sliding * int(getattr(text, "sliding_window", None) or 0),
        positions=getattr(text, "max_position_embeddings", None),
    ), model  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Nothing(Prefill):
    """Attention whose output nobody reads: only what is stored counts here."""

    info = Info(slug="nothing", phase="prefill")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2])

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.new_zeros(*q.shape[:3], v.shape[-1])


def measured_bytes(shape: Shape, one: Contender, n: int, plans: Sequence[Plan] = (), seed: int = 0) -> list[int]:
    """Bytes each managed layer holds after a prompt of n random tokens and its compression: keys, values, codes, indices, positions."""
    runners, kept = {}, {}
    generator = torch.Generator().manual_seed(seed)
    layout, sequence = shape.layout, {}
    rotary = Rotary(500_000.0 ** -torch.arange(0, 1, 2 / layout.head_dim))
    methods: dict[str, Any] = one.methods
    leader: KVLayer | None = None
    for index in shape.managed:
        q, k, v = (
            torch.randn(1, heads, n, layout.head_dim, generator=generator).to(shape.dtype)
            for heads in (layout.query_heads, layout.kv_heads, layout.kv_heads)
        )
        layer = KVLayer()
        layer.leader = leader
        leader = leader or layer
        stored = layer.update(k, v)
        runner = LayerRunner(
            layer=index, layers=shape.layers, prefill=_Nothing(), decode=methods.get("decode"), policy=methods.get("cache"),
            plans={plan.slug: plan for plan in plans}, when="prompt", impl="auto", seed=seed, rotary=rotary,
        )  # fmt: skip
        runner.run(LayerCall(q=q, k=stored[0], v=stored[1], scale=layout.head_dim**-0.5, softcap=None, real=None, shared=sequence), layer)
        runners[index], kept[index] = runner, layer
    found = []
    for index, layer in kept.items():
        runners[index].end_prompt(layer)
        if "decode" in methods:
            one_token = [
                torch.randn(1, heads, 1, layout.head_dim, generator=generator).to(shape.dtype)
                for heads in (layout.query_heads, layout.kv_heads, layout.kv_heads)
            ]
            stored = layer.update(one_token[1], one_token[2])
            runners[index].run(
                LayerCall(q=one_token[0], k=stored[0], v=stored[1], scale=layout.head_dim**-0.5, softcap=None, real=None, shared=sequence),
                layer,
            )
        found.append(layer.kv_bytes + layer.side_bytes)
    return found


def fit(
    shape: Shape, model: PreTrainedModel, specs: Sequence[str], *, memory: int, lengths: Sequence[int] = (8192, 32768, 131072),
    plans: Sequence[Plan] = (), reserve: float = 0.1, tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """The result of `saccade fit`: for each method the bytes a token takes, the longest context at batch 1, the batch at `lengths`.

    memory: bytes in all; weights are taken off, and the share `reserve` for activations. Prompts are compressed layer by layer
    (`when="call"`), so that one layer at a time is whole. A method that fails has its reason instead.
    """
    room = memory * (1 - reserve) - shape.weights
    rows = []
    for spec in ["dense", *specs]:
        tell(spec)
        try:
            one = contender(spec)
            check_methods(model, {place: one.methods.get(place) for place in ("prefill", "decode", "cache")})
            rows.append(_row(shape, one, room, lengths, plans))
        except Exception as error:  # said in its row; the others go on
            rows.append({"method": spec, "status": "failed", "error": str(error).splitlines()[0] or type(error).__name__})
        gc.collect()
    return {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {"saccade": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": {
            "name": shape.name, "layers": shape.layers, "managed_layers": len(shape.managed), "query_heads": shape.layout.query_heads,
            "kv_heads": shape.layout.kv_heads, "head_dim": shape.layout.head_dim, "dtype": str(shape.dtype).removeprefix("torch."),
            "weight_bytes": shape.weights, "positions": shape.positions,
        },
        "settings": {"memory": memory, "reserve": reserve, "lengths": list(lengths), "measured_at": list(SIZES)},
        "rows": rows,
    }  # fmt: skip


def _row(shape: Shape, one: Contender, room: float, lengths: Sequence[int], plans: Sequence[Plan]) -> dict[str, Any]:
    managed = len(shape.managed)
    first, middle, last = (
        managed * n * shape.token_bytes if one.dense else sum(measured_bytes(shape, one, n, plans)) for n in SIZES
    )
    slope = max(0.0, (last - first) / (SIZES[2] - SIZES[0]))
    fixed = last - slope * SIZES[2]
    straight = abs(middle - (fixed + slope * SIZES[1])) <= CURVED * middle

    def needed(n: float, batch: int = 1) -> float:
        held = fixed + slope * n
        # one layer is whole while it is being compressed
        whole = 0.0 if one.dense else max(0.0, shape.token_bytes * n - held / managed)
        return batch * (shape.windows * shape.token_bytes + held + whole)

    return {
        "method": one.spec, "status": "ok", "error": None, "token_bytes": slope, "fixed_bytes": fixed, "straight": straight,
        "measured": dict(zip(map(str, SIZES), (first, middle, last), strict=True)),
        "share": last / (SIZES[2] * shape.token_bytes * managed), "context": _largest(lambda n: needed(n) <= room),
        "batch": {str(n): _largest(lambda b, n=n: needed(n, b) <= room) for n in lengths},
    }  # fmt: skip


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest whole number below 2^40 that fits, 0 where none does."""
    low, high = 0, 1
    while high < 1 << 40 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def size_text(n: float) -> str:
    """Bytes as people read them: 12.3 GiB."""
    if n < 1024:
        return f"{n:.0f} B"
    power = min(4, int(math.log(n, 1024)))
    return f"{n / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
