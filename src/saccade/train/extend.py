"""Extending a model's context: stretched positions, low-rank adapters, and a sparse pattern while training.

Positions are interpolated (or the rotary base is raised), adapters of low rank go on the q, k, v and o projections, embeddings and norms
are trained in full, and attention runs in longlora's shifted groups, or any other prefill method, until training ends. The extended model
attends densely. What was trained is written as `adapter.safetensors`, the whole model as `weights/`.

Source: longlora, arXiv 2309.12307, section 3 and its settings (AdamW 0.9, 0.95, 20 warm-up steps, a constant rate).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from saccade.attach import attach
from saccade.core import fingerprint
from saccade.core.files import atomic_write
from saccade.methods import build
from saccade.models.pocket import quiet

Positions = Literal["interpolate", "base", "keep"]
Adapt = Literal["lora+", "lora", "full"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SCHEMA = "saccade.adapter/1"
Batches = Callable[[int, int], Tensor]  # (step, rows) -> ids (rows, context), always the same for the same numbers


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """How to extend a model.

    start: folder of the saved model. out: folder for `metrics.jsonl`, `adapter.safetensors` and `weights/`. context: tokens it should
    serve. original: tokens it was trained for (None: its max_position_embeddings). positions: "interpolate" divides positions by
    ceil(context / original), "base" raises the rotary base by that factor to the power d / (d - 2), "keep" changes nothing.
    method: the prefill method that runs while training, None for dense attention. adapt: "lora+" trains adapters, embeddings and
    norms, "lora" adapters only, "full" everything. rank, alpha: of the adapters. batch: sequences a step, of which `rows` are run at a
    time. rate: reached after `warmup` steps, then constant. clip: longest gradient.
    """

    start: Path
    out: Path
    context: int
    original: int | None = None
    positions: Positions = "interpolate"
    method: str | None = "longlora"
    adapt: Adapt = "lora+"
    rank: int = 8
    alpha: int = 16
    steps: int = 1000
    batch: int = 64
    rows: int = 1
    rate: float = 2e-5
    warmup: int = 20
    clip: float = 1.0
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("context", "rank", "alpha", "steps", "batch", "rows", "warmup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        for name, known in (("positions", get_args(Positions)), ("adapt", get_args(Adapt))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(known)}")
        if self.batch % self.rows:
            raise ValueError(f"a batch of {self.batch} sequences can't be run {self.rows} at a time: give a divisor of it")
        if not (self.start / "config.json").is_file():
            raise ValueError(f"{self.start} holds no saved model: give a folder with config.json and its weights")
        if self.method is not None:
            build(self.method)  # its own error where the spec is wrong


def stretched(config: PretrainedConfig, context: int, original: int | None, how: Positions) -> PretrainedConfig:
    """The configuration with positions for `context` tokens; ValueError where its rotary embedding is scaled already or absent."""
    text = config.get_text_config(decoder=True)
    had = original or int(text.max_position_embeddings)
    factor = math.ceil(context / had)
    text.max_position_embeddings = max(context, had)
    if how == "keep" or factor == 1:
        return config
    rope = dict(getattr(text, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        raise ValueError(f"positions are stretched where the rotary embedding is a plain one, this model's is {rope or 'none'}: use keep")
    if how == "interpolate":
        text.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
    else:
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        text.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] * factor ** (dim / (dim - 2))}
    return config


def load_stretched(config: ExtendConfig) -> PreTrainedModel:
    """The model to extend, float32, with its positions stretched, not yet trained."""
    settings = stretched(AutoConfig.from_pretrained(config.start, local_files_only=True), config.context, config.original, config.positions)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(config.start, config=settings, dtype=torch.float32, local_files_only=True)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(torch.device(device))  # pyright: ignore[reportArgumentType]


def add_adapters(model: PreTrainedModel, rank: int, alpha: int) -> Any:
    """`model` with adapters on its q, k, v and o projections, everything else frozen; a peft model around the same modules."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("low-rank adapters need peft: pip install 'saccade[train]'") from None
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [name for name in PROJECTIONS if name not in found]:
        raise ValueError(f"{type(model).__name__} has no {', '.join(missing)} to put adapters on: train it with adapt='full'")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(PROJECTIONS), lora_dropout=0.0))


def choose_trainable(model: PreTrainedModel, adapt: Adapt) -> list[nn.Parameter]:
    """Leave on the gradients of what is trained beside the adapters: nothing, embeddings and norms, or everything."""
    for module in model.modules():
        whole = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False):
            if adapt == "full" or (adapt == "lora+" and whole):
                parameter.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def tune(
    model: PreTrainedModel, batches: Batches, config: ExtendConfig, progress: Callable[[dict[str, Any]], None] | None = None
) -> PreTrainedModel:
    """Train `model` in place on `batches` and return it with adapters merged; `progress` gets a row after every step.

    A row: step, loss (nats a token), seconds, density (score pairs computed / those of dense attention). `config.out` receives
    `adapter.safetensors`. The parameters that are trained begin as they are; adapters begin at random, fixed by the seed, times zero.
    """
    torch.manual_seed(config.seed)
    wrapped = None if config.adapt == "full" else add_adapters(model, config.rank, config.alpha)
    trained = choose_trainable(model, config.adapt)
    optimizer = torch.optim.AdamW(trained, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0)
    began, device = time.monotonic(), next(model.parameters()).device
    model.train()
    with attach(model, prefill=config.method) if config.method is not None else nullcontext() as handle:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.rate * min(1.0, (step + 1) / config.warmup)
            total = 0.0
            for rows in batches(step, config.batch).split(config.rows):
                loss = next_token_loss(model, rows.to(device)).mean() * len(rows) / config.batch
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                density = None if handle is None else handle.stats().prefill_density
                seconds = round(time.monotonic() - began, 2)
                progress({"step": step + 1, "loss": round(total, 5), "seconds": seconds, "density": density})
    model.eval()
    save_adapter(model, config)
    return model if wrapped is None else wrapped.merge_and_unload()


def next_token_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Nats of every token after the first, `(B, N - 1)`.

    On a GPU under bfloat16 autocast: in float32 torch's attention writes all scores of grouped heads out, 4 bytes for each of N^2.
    """
    with torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else nullcontext():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def save_adapter(model: PreTrainedModel, config: ExtendConfig) -> Path:
    """Everything that was trained, under the names it has in the model, and the settings: `adapter.safetensors`."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    settings = {name: value for name, value in asdict(config).items() if name not in ("start", "out", "device")}
    facts = {"schema": SCHEMA, "settings": settings, "model": type(model).__name__}
    config.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.out / "adapter.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"adapter": json.dumps(facts)})
    return config.out / "adapter.safetensors"


def load_extended(start: str | Path, adapter: str | Path, device: str | None = None) -> PreTrainedModel:
    """The model in `start` with an adapter of `tune` merged in, in eval mode, float32.

    ValueError when the file is no adapter, or one of a model with other parameters.
    """
    try:
        with safe_open(adapter, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("adapter", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError):
        raise ValueError(f"{adapter} can't be read: give an adapter.safetensors that `saccade train extend` wrote") from None
    if facts.get("schema") != SCHEMA:
        raise ValueError(f"{adapter} is no adapter of this version: give an adapter.safetensors that `saccade train extend` wrote")
    config = ExtendConfig(start=Path(start), out=Path(adapter).parent, device=device, **facts["settings"])
    model = load_stretched(config)
    wrapped = None if config.adapt == "full" else add_adapters(model, config.rank, config.alpha)
    own = dict(model.named_parameters())
    if any(name not in own or own[name].shape != value.shape for name, value in tensors.items()):
        raise ValueError(f"{adapter} was trained on a model with other parameters than {start}: give the folder it was made from")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return (model if wrapped is None else wrapped.merge_and_unload()).eval()


def windows(ids: Tensor, context: int, seed: int) -> Batches:
    """Batches of `context` consecutive tokens from random places of `ids (n,)`; ValueError when there are too few tokens."""
    if len(ids) <= context:
        raise ValueError(f"the text has {len(ids)} tokens, too few for sequences of {context}: give a longer text")

    def batch(step: int, rows: int) -> Tensor:
        rng = Random(f"{seed}/{step}")
        places = [rng.randrange(len(ids) - context) for _ in range(rows)]
        return torch.stack([ids[place : place + context] for place in places])

    return batch


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: Tensor, length: int, most: int = 32) -> float:
    """Nats a token of dense attention over up to `most` excerpts of `length` tokens, one after the other in `ids (n,)`."""
    excerpts = ids[: len(ids) // length * length].view(-1, length)[:most]
    device = next(model.parameters()).device
    return float(torch.cat([next_token_loss(model, row[None].to(device)) for row in excerpts]).mean())


def extend(config: ExtendConfig, text: str, progress: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Extend the model in `config.start` on `text`; returns the folder of the extended model, which any `from_pretrained` loads.

    The last tenth of the text is held out: `report.json` tells the loss on it, at the original length and at the new one, before and
    after. `metrics.jsonl` has a row for every step.
    """
    tokenizer = AutoTokenizer.from_pretrained(config.start, local_files_only=True)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    cut = len(ids) * 9 // 10
    if len(ids) - cut < config.context:
        raise ValueError(f"the text has {len(ids)} tokens, its last tenth less than {config.context}: give a longer text")
    config.out.mkdir(parents=True, exist_ok=True)
    model = load_stretched(config).eval()
    had = config.original or int(AutoConfig.from_pretrained(config.start, local_files_only=True).max_position_embeddings)
    lengths = sorted({min(had, config.context), config.context})
    before = {n: mean_loss(model, ids[cut:], n) for n in lengths}
    rows: list[str] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(json.dumps(row) + "\n")
        if progress is not None:
            progress(row)

    model = tune(model, windows(ids[:cut], config.context, config.seed), config, note)
    folder = config.out / "weights"
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "schema": "saccade.extend/1", "model": fingerprint(model), "lengths": lengths,
        "nats_before": [round(before[n], 4) for n in lengths], "nats_after": [round(mean_loss(model, ids[cut:], n), 4) for n in lengths],
    }  # fmt: skip
    for name, written in (("metrics.jsonl", "".join(rows)), ("report.json", json.dumps(report, indent=1) + "\n")):
        with atomic_write(config.out / name) as temporary:
            temporary.write_text(written, encoding="utf-8")
    return folder
