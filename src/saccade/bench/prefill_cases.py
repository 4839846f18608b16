"""Cases of `prefill`: whole methods on one attention layer, and on the forward pass of a model with random weights.

One layer: a method runs on a real LayerContext, and every attention call it makes is recorded. From that come three times:
  attention    the recorded calls again, and nothing else ("saccade, attention": ms);
  selection    the method again, but its attention calls return what they returned before: all that is left is its own work, choosing,
               permuting, merging (selection_ms of the same row);
  whole layer  the method as `saccade.attach` calls it, counting included ("saccade, whole layer").
A method that computes its scores itself makes no calls that could be recorded: it has the last row only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.attach.calls import attention_calls
from saccade.attach.layercall import LayerCall
from saccade.attach.layers import LayerRunner
from saccade.bench import peers, prefill_inputs
from saccade.bench.attend_cases import Shape as AttendShape
from saccade.bench.attend_cases import work
from saccade.bench.case import Case, Contestant, Field, Run, Settings, Work
from saccade.bench.exact import AttentionCheck, distance
from saccade.bench.prefill_inputs import KINDS, SHAPES, Shape
from saccade.core import HeadLayout, LayerContext, Partial, Prefill, Selection
from saccade.core.context import AttendPartial
from saccade.methods import build, load_all
from saccade.ops import attend, last_run

LAYER, LAYERS = 16, 32  # where in a model the layer stands: some methods leave the first layers dense
DISTANCE_ROWS = 64  # every so many rows are compared with dense attention
MLP, VOCABULARY = 3.5, 1024  # of the model with random weights: hidden sizes, and few words, which attention does not care about
# asked for by name they run: fewer multiplications, which matrix units do all the same, or all probabilities written out for later
SAVES_NOTHING = ("deltallm", "spatten", "ltri-llm")
QUICK = ("minference", "sampleattention")
CPU_QUICK = (
    "minference(columns=0.05, offsets=0.1)", "sampleattention(alpha=0.8)", "dhsa(budget=0.25)", "deltallm",
)  # fmt: skip


@dataclass
class Tape:
    """The attention calls of a method, what they were given and what they returned. run: computes one, as `saccade.attach` has it."""

    run: AttendPartial
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    returned: list[Partial] = field(default_factory=list)

    def record(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        self.calls.append(((q, k, v, selection), options))
        self.returned.append(self.run(q, k, v, selection, **options))
        return self.returned[-1]

    def replay(self) -> list[Partial]:
        return [self.run(*given, **options) for given, options in self.calls]

    @property
    def single(self) -> Selection | None:
        """The selection, if the method is one plain call over one."""
        if len(self.calls) != 1 or self.calls[0][1].keys() != {"return_lse"}:
            return None
        return self.calls[0][0][3]


def context(q: Tensor, k: Tensor, v: Tensor, calls: Callable[..., Partial]) -> LayerContext:
    """The context of one layer whose attention calls go to `calls`, bound as `saccade.attach` binds them."""

    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        return calls(q, k, v, selection, **{"return_lse": False, **options}).out

    def part(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        return calls(q, k, v, selection, **{"return_lse": True, **options})

    return LayerContext(
        layer=LAYER, layers=LAYERS, layout=HeadLayout.of(q, k, v), scale=q.shape[-1] ** -0.5, attend=run, partial=part, seen=k.shape[2]
    )


def recorded(method: Prefill, q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tape, Callable[[], Tensor]]:
    """The method's attention calls, and a call that does the method's own work alone."""
    tape = Tape(attention_calls("prefill", scale=q.shape[-1] ** -0.5, softcap=None, impl=impl))
    method.attend(context(q, k, v, tape.record), q, k, v)

    def own_work() -> Tensor:
        left: Iterator[Partial] = iter(tape.returned)
        return method.attend(context(q, k, v, lambda *_, **__: next(left)), q, k, v)

    return tape, own_work


def _layer(spec: str, shape: Shape, kind: str, s: Settings) -> Field:
    method = _prefill(spec)
    q, k, v = prefill_inputs.make(kind, shape, s)
    runner = LayerRunner(
        layer=LAYER, layers=LAYERS, prefill=method, decode=None, policy=None, plans={}, when="prompt", impl=s.impl, seed=0
    )

    def whole() -> Tensor:
        call = LayerCall(q=q, k=k, v=v, scale=shape.dim**-0.5, softcap=None, real=None, shared={})
        return runner.run(call, None)

    rows = slice(DISTANCE_ROWS - 1, None, DISTANCE_ROWS)
    exact = attend(q, k, v).out[:, :, rows]
    off = distance(whole()[:, :, rows], exact)
    density = runner.stats.prefill.density
    del exact
    tape, own_work = recorded(method, q, k, v, s.impl)
    share = prefill_inputs.concentration(q, k)
    note = f"output {off:.1e} from dense; 90% of a row's attention lies on {share:.1%} of its keys"
    dense = work(AttendShape(shape.n, 1, shape.heads, shape.kv_heads, shape.dim), shape.pairs(), s.size, False)
    less = replace(dense, flops=(dense.flops or 0.0) * (density if density is not None else 1.0))
    contestants = []
    if tape.calls:
        contestants.append(Contestant(
            name="saccade, attention", role="ours", work=less, select=own_work, checked=tape.single is not None,
            make=lambda: Run(call=tape.replay, outputs=lambda raw: (raw[0].out,), impl=lambda: last_run().impl),
        ))  # fmt: skip
    contestants.append(Contestant(
        name="saccade, whole layer", role="ours", work=less, checked=False,
        make=lambda: Run(call=whole, impl=(lambda: last_run().impl) if tape.calls else "its own", note=note),
    ))  # fmt: skip
    contestants += [replace(c, shared=f"{kind} {shape}") for c in peers.dense(peers.Inputs(q, k, v), dense, checked=False)]
    return Field(contestants=contestants, check=AttentionCheck.of(q, k, v, selection=tape.single), density=density)


def _model(spec: str, shape: Shape, layers: int, s: Settings) -> Field:
    import saccade

    method, model = _prefill(spec), random_model(shape, layers, s)
    ids = torch.randint(3, VOCABULARY, (1, shape.n), generator=s.generator(), device=s.device)

    def forward() -> Tensor:
        return model(ids, logits_to_keep=1).logits

    def attached() -> Tensor:
        with saccade.attach(model, prefill=method, impl=s.impl):  # pyright: ignore[reportArgumentType]
            return forward()

    def with_cudnn() -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return forward()

    with saccade.attach(model, prefill=method, impl=s.impl) as handle:  # pyright: ignore[reportArgumentType]
        forward()
        density = handle.stats().prefill_density
    weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    attention = 4 * shape.dim * shape.pairs() * layers

    def amount(share: float) -> Work:
        return Work(flops=2 * weights * shape.n + attention * share, bytes=None, unit="FLOP")

    contestants = [
        Contestant(
            name="saccade, forward pass", role="ours", work=amount(1.0 if density is None else density),
            make=lambda: Run(call=attached, impl=lambda: last_run().impl),
        ),
        Contestant(name="SDPA, forward pass", role="dense", work=amount(1.0), make=lambda: Run(call=forward, impl="sdpa")),
    ]  # fmt: skip
    if s.cuda:
        contestants.append(
            Contestant(name="cuDNN, forward pass", role="dense", work=amount(1.0), make=lambda: Run(call=with_cudnn, impl="sdpa"))
        )
    return Field(contestants=contestants, density=density, note="random weights: attention has no structure to find")


def random_model(shape: Shape, layers: int, s: Settings, hidden: int | None = None) -> Any:
    """A Llama of the shape, with few words and random weights, on the device. hidden: channels, as many as the heads have by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = hidden or shape.heads * shape.dim
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=round(MLP * hidden), num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.dim, max_position_embeddings=shape.n,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if s.cuda else []), torch.device(s.device):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    model = model.to(s.dtype).eval()
    model.set_attn_implementation("sdpa")
    return model


def _prefill(spec: str) -> Prefill:
    method = build(spec)
    if not isinstance(method, Prefill):
        raise ValueError(f"{method.info.slug} acts in the {method.info.phase} phase: bench prefill takes prefill methods")
    if "calibration" in method.info.needs:
        raise ValueError(f"{method.info.slug} needs a calibration plan, which inputs without a model can't have: leave it out")
    return method


# -- cases ---------------------------------------------------------------------------------------------------------------


def layer_case(spec: str, shape: Shape, kind: str = "captured", size: int = 2) -> Case:
    rows, keys = (heads * shape.n * shape.dim * size for heads in (shape.heads, shape.kv_heads))
    # outputs of a whole run, a recorded one and the dense ones; keys repeated for kernels without groups; lists of keys
    need = 8 * rows + 4 * keys + 2**30 * (size == 2) + 4 * shape.heads * shape.n**2 / 64
    return Case(
        family="one layer", shape={**vars(shape), "inputs": kind, "method": spec}, need=need, build=partial(_layer, spec, shape, kind)
    )


def model_case(spec: str, shape: Shape, layers: int, size: int = 2) -> Case:
    hidden = shape.heads * shape.dim
    weights = layers * hidden * (2 * hidden + 2 * shape.kv_heads * shape.dim + 3 * MLP * hidden)
    need = size * (weights + (8 + 2 * MLP) * hidden * shape.n) + 2**30 * (size == 2) + 4 * shape.heads * shape.n**2 / 64
    return Case(
        family="whole model", shape={**vars(shape), "layers": layers, "method": spec}, need=need,
        build=partial(_model, spec, shape, layers),
    )  # fmt: skip


def asked(
    methods: list[str], lengths: list[int], *, shape: str, inputs: str, layers: int | None = None, size: int = 2
) -> list[Case]:
    """One case for each length and method. With `layers` the forward pass of a model of so many layers, else one attention layer."""
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape} is not known: choose one of {', '.join(SHAPES)}")
    if inputs not in KINDS:
        raise ValueError(f"--inputs {inputs} is no kind of inputs: choose one of {', '.join(KINDS)}")
    heads, kv_heads, dim = SHAPES[shape]
    specs = [_prefill(spec).spec for spec in methods]
    found = []
    for n in lengths:
        sized = Shape(n, heads, kv_heads, dim)
        found += [layer_case(m, sized, inputs, size) if layers is None else model_case(m, sized, layers, size) for m in specs]
    return found


def default_methods() -> list[str]:
    """Every prefill method that runs without a plan, but for those that are known to save nothing here."""
    return [
        slug for slug, kind in load_all().items()
        if issubclass(kind, Prefill) and "calibration" not in kind.info.needs and slug not in SAVES_NOTHING
    ]  # fmt: skip


def cases(grid: str, cuda: bool) -> list[Case]:
    if not cuda:
        lengths = [256, 512] if grid == "quick" else [1024, 2048]
        small = [layer_case(m, Shape(n, 6, 2, 64), size=4) for n in lengths for m in CPU_QUICK]
        made = layer_case(CPU_QUICK[0], Shape(512, 6, 2, 64), "structured", size=4)
        return [*small, made, model_case(CPU_QUICK[0], Shape(512, 4, 2, 32), 2, size=4)]
    if grid == "quick":
        many = [layer_case(m, Shape(n), kind) for n in (8192, 32768) for m in QUICK for kind in ("captured", "structured")]
        return [*many, model_case(QUICK[0], Shape(32768), 2)]
    methods = default_methods()
    return [
        *(layer_case(m, Shape(n), kind) for n in (32768, 131072) for m in methods for kind in ("captured", "structured")),
        *(model_case(m, Shape(n), 2) for n in (32768, 131072) for m in methods),
    ]  # fmt: skip
