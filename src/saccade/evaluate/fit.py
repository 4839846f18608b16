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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from saccade import __version__
from saccade.attach.layers import LayerCall, LayerRunner
from saccade.attach.models import caches_latents, check_methods, layer_kinds, managed_layers, text_config
from saccade.cache import KVLayer
from saccade.core import HeadLayout, LayerContext, Plan, Prefill, PromptReduction, Rotary, Selection
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


class Held(NamedTuple):
    """Bytes of one layer: on the device (keys, values, codes, indices, positions), and moved to the host's memory."""

    device: int
    host: int


def measured_bytes(shape: Shape, one: Contender, n: int, plans: Sequence[Plan] = (), seed: int = 0) -> list[Held]:
    """What each managed layer holds after a prompt of n random tokens, its compression, and one decoding step where a decode method reads.

    A method that reads the prompt and fills the cache as well runs as it is; of any other prefill method nothing is left in the cache, so
    none is run. One that shortens the prompt leaves the tokens it keeps.
    """
    methods: dict[str, Any] = one.methods
    reading = methods.get("prefill")
    if isinstance(reading, PromptReduction):
        n, reading = min(n, reading.size(n)), None
    if reading not in [method for phase, method in methods.items() if phase != "prefill"]:
        reading = None
    generator = torch.Generator().manual_seed(seed)
    layout, prompt, step = shape.layout, {}, {}
    rotary = Rotary(500_000.0 ** -torch.arange(0, 1, 2 / layout.head_dim))

    def call(m: int, layer: KVLayer, shared: dict[str, Any]) -> LayerCall:
        """m further tokens, stored in the layer."""
        q, k, v = (
            torch.randn(1, heads, m, layout.head_dim, generator=generator).to(shape.dtype)
            for heads in (layout.query_heads, layout.kv_heads, layout.kv_heads)
        )
        stored = layer.update(k, v)
        return LayerCall(q=q, k=stored[0], v=stored[1], scale=layout.head_dim**-0.5, softcap=None, real=None, shared=shared)

    runners, kept = {}, {}
    leader: KVLayer | None = None
    for index in shape.managed:
        layer = KVLayer()
        layer.leader = leader
        leader = leader or layer
        runners[index] = runner = LayerRunner(
            layer=index, layers=shape.layers, prefill=reading or _Nothing(), decode=methods.get("decode"), policy=methods.get("cache"),
            plans={plan.slug: plan for plan in plans}, when="prompt", impl="auto", seed=seed, rotary=rotary,
        )  # fmt: skip
        runner.run(call(n, layer, prompt), layer)
        kept[index] = layer
    found = []
    for index, layer in kept.items():
        runners[index].end_prompt(layer)
        if "decode" in methods:
            runners[index].run(call(1, layer, step), layer)
        found.append(Held(layer.kv_bytes + layer.side_bytes, layer.host_bytes))
    return found


def fit(
    shape: Shape, model: PreTrainedModel, specs: Sequence[str], *, memory: int, lengths: Sequence[int] = (8192, 32768, 131072),
    plans: Sequence[Plan] = (), reserve: float = 0.1, sizes: Sequence[int] | None = None, tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """The result of `saccade fit`: for each method the bytes a token takes, the longest context at batch 1, the batch at `lengths`.

    memory: bytes in all; weights are taken off, and the share `reserve` for activations. Prompts are compressed layer by layer
    (`when="call"`), so that one layer at a time is whole. What is moved to the host's memory is told, and counts for nothing else. A method
    that fails has its reason instead. sizes: three growing numbers of tokens at which bytes are measured; they should be longer than the
    windows of the methods, which drop nothing below them: a row whose method frees memory and dropped nothing says so.
    """
    sizes = list(SIZES if sizes is None else sizes)
    check_sizes(sizes)
    room = memory * (1 - reserve) - shape.weights
    rows = []
    for spec in ["dense", *specs]:
        tell(spec)
        try:
            one = contender(spec)
            check_methods(model, {place: one.methods.get(place) for place in ("prefill", "decode", "cache")})
            rows.append(_row(shape, one, room, lengths, plans, sizes))
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
        "settings": {"memory": memory, "reserve": reserve, "lengths": list(lengths), "measured_at": sizes},
        "rows": rows,
    }  # fmt: skip


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise ValueError unless there are three growing numbers of tokens."""
    if len(sizes) != 3 or not 0 < sizes[0] < sizes[1] < sizes[2]:
        raise ValueError(f"bytes are measured at three growing sizes, not at {', '.join(map(str, sizes))}: give them like 2K,3K,4K")


def _row(
    shape: Shape, one: Contender, room: float, lengths: Sequence[int], plans: Sequence[Plan], sizes: Sequence[int]
) -> dict[str, Any]:
    managed = len(shape.managed)
    plain = [[Held(n * shape.token_bytes, 0)] * managed for n in sizes]
    held_at = plain if one.dense else [measured_bytes(shape, one, n, plans) for n in sizes]
    first, middle, last = (sum(layer.device for layer in layers) for layers in held_at)
    hosts = [sum(layer.host for layer in layers) for layers in held_at]
    slope = max(0.0, (last - first) / (sizes[2] - sizes[0]))
    fixed = last - slope * sizes[2]
    straight = abs(middle - (fixed + slope * sizes[1])) <= CURVED * middle
    share = last / (sizes[2] * shape.token_bytes * managed)
    idle = any(method.info.frees_memory for method in one.members) and share >= 1 and not hosts[2]

    def needed(n: float, batch: int = 1) -> float:
        held = fixed + slope * n
        # one layer is whole while it is being compressed
        whole = 0.0 if one.dense else max(0.0, shape.token_bytes * n - held / managed)
        return batch * (shape.windows * shape.token_bytes + held + whole)

    return {
        "method": one.spec, "status": "ok", "error": None, "token_bytes": slope, "fixed_bytes": fixed, "straight": straight,
        "measured": dict(zip(map(str, sizes), (first, middle, last), strict=True)), "share": share, "idle": idle,
        "host_token_bytes": max(0.0, (hosts[2] - hosts[0]) / (sizes[2] - sizes[0])),
        "host_measured": dict(zip(map(str, sizes), hosts, strict=True)), "context": _largest(lambda n: needed(n) <= room),
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
