"""Converting a trained transformer: softmax layers are replaced by mixers that keep its projections, and are taught to do as they did.

1. The model becomes a hybrid decoder (`SaccadeForCausalLM`) with the same weights; chosen layers get the mixer of a spec, which takes over
   q, k, v and o.
2. Attention transfer: the trained model runs on text, and every new layer learns, from the input of the layer it stands for, to give the
   same outputs of heads (before the last projection). Layers see the trained model's inputs, never each other's, and only what is
   new in them is trained: maps, factors, gates. Each layer's loss is computed and dropped while the model runs.
3. Adapters of low rank on q, k, v and o learn to predict the next token; they are then merged.

The result is saved as `OUT/weights`, which any `from_pretrained` loads after `import saccade`. A run that was cut off goes on, by the same
call, to the same numbers.

Source: lolcats, arXiv 2410.10254, sections 3 and 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import MixerShape, parse_spec
from saccade.core.files import atomic_write
from saccade.methods import build_mixer
from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM, schedule
from saccade.models.pocket import quiet
from saccade.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from saccade.train.extend import PROJECTIONS, Batches, add_adapters, next_token_loss
from saccade.train.metrics import FILE as METRICS
from saccade.train.metrics import append_row, cut_rows

SCHEMA = "saccade.convert/1"
LOSS_SCALE = 1000.0  # on the squared errors of the transfer, as published
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How to convert a model.

    to: the mixer's spec. out: folder for `convert.json`, `weights/`, and checkpoints and `metrics.jsonl` of
    both stages in `transfer/` and `tune/`. pattern: which layers change, as
    `saccade.models.decoder.schedule` reads it: "pure" (all), "3:1", "at:0,7" (all but these). transfer_steps, lora_steps: of the
    two stages, 0 leaves one out. transfer_rate, lora_rate: AdamW's, falling to a tenth along a cosine. rank, alpha: of the adapters.
    tune_new: train what is new beside the adapters too. batch: sequences a step, of which `rows` are run at a time. every: steps from one
    checkpoint to the next. clip: longest gradient of the second stage. seed: of all that is drawn.
    """

    to: str
    out: Path
    pattern: str = "pure"
    transfer_steps: int = 200
    lora_steps: int = 200
    transfer_rate: float = 1e-2
    lora_rate: float = 1e-4
    rank: int = 8
    alpha: int = 16
    tune_new: bool = True
    batch: int = 8
    rows: int = 8
    every: int = 50
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"transfer_steps": 0, "lora_steps": 0, "rank": 1, "alpha": 1, "batch": 1, "rows": 1, "every": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
        if self.batch % self.rows:
            raise ValueError(f"a batch of {self.batch} sequences can't be run {self.rows} at a time: give a divisor of it")
        for name in ("transfer_rate", "lora_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        build_mixer(self.to)  # its own error where the spec is wrong


def swap(teacher: PreTrainedModel, to: str, pattern: str = "pure", seed: int = 0) -> SaccadeForCausalLM:
    """`teacher`, a Llama-like transformers model, as a hybrid decoder whose layers of `pattern` are mixers `to`, with its weights.

    It is on the teacher's device, in its dtype, in eval mode; what the mixers add is new, drawn by the seed. Fields `theta` and `bias` of
    the spec follow the teacher unless they are given. ValueError for models that are built otherwise, and for mixers that can't take over
    the projections or turn by other angles.
    """
    facts = _facts(teacher)
    config = teacher.config
    kept = f"softmax(theta={facts['theta']!r}, bias={facts['bias']})"
    specs = schedule(
        pattern, config.num_hidden_layers, _fitted(to, facts), build_mixer(kept).spec
    )
    shape = SaccadeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, layers=specs,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads, head_dim=facts["head_dim"],
        max_position_embeddings=config.max_position_embeddings, rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = SaccadeForCausalLM(shape)
    base = teacher.model
    _copy(student.model.embed_tokens, base.embed_tokens)
    _copy(student.model.norm, base.norm)
    if not config.tie_word_embeddings:
        _copy(student.lm_head, teacher.lm_head)
    for index, (block, layer) in enumerate(zip(student.model.stack.blocks, base.layers, strict=True)):
        _copy(block.norm, layer.input_layernorm)
        _copy(block.feed_norm, layer.post_attention_layernorm)
        _copy(block.feed_forward, layer.mlp)
        for name in PROJECTIONS:
            if not isinstance(getattr(block.mixer, name, None), nn.Linear):
                raise ValueError(f"{specs[index]} has no {name} to take over from a trained layer: convert to lolcats or hedgehog")
            _copy(getattr(block.mixer, name), getattr(layer.self_attn, name), f"{specs[index]}: {name}")
    some = next(teacher.parameters())
    return student.to(device=some.device, dtype=some.dtype).eval()


def new_parameters(student: SaccadeForCausalLM) -> dict[str, nn.Parameter]:
    """What the mixers added to the trained model, by name."""
    found: dict[str, nn.Parameter] = {}
    for index, block in enumerate(student.model.stack.blocks):
        for name, parameter in block.mixer.named_parameters():
            if not any(part in PROJECTIONS for part in name.split(".")):
                found[f"model.stack.blocks.{index}.mixer.{name}"] = parameter
    return found


def transfer_losses(teacher: PreTrainedModel, student: SaccadeForCausalLM, ids: Tensor, done: Callable[[Tensor], None]) -> list[float]:
    """The mean squared error of every new layer's heads on `ids (B, N)`, in the layers' order; `done` gets each loss while it has a graph.

    The teacher runs once, without gradients; a layer's loss is let go before the next layer runs.
    """
    losses: list[float] = []
    with ExitStack() as hooks, torch.no_grad():
        for block, layer in zip(student.model.stack.blocks, teacher.model.layers, strict=True):
            if any(True for _ in _added(block.mixer)):
                hooks.enter_context(_Lesson(layer.self_attn, block.mixer, losses, done))
        teacher.model(input_ids=ids, use_cache=False)
    return losses


class _Lesson:
    """Hooks on a trained attention layer that compare the mixer beside it on the same input."""

    def __init__(self, attention: Any, mixer: Any, losses: list[float], done: Callable[[Tensor], None]) -> None:
        self.attention, self.mixer, self.losses, self.done = attention, mixer, losses, done

    def __enter__(self) -> None:
        heads: list[Tensor] = []
        ours: list[Tensor] = []

        def compare(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any], out: Any) -> None:
            x = given["hidden_states"] if "hidden_states" in given else args[0]
            with torch.enable_grad():
                self.mixer(x.detach(), keep=False)
                loss = (ours.pop().float() - heads.pop().float()).square().mean()
                self.losses.append(loss.item())
                self.done(loss)

        # what goes into the last projection is what the heads read
        self.handles = [
            self.attention.o_proj.register_forward_pre_hook(lambda module, args: heads.append(args[0])),
            self.mixer.o_proj.register_forward_pre_hook(lambda module, args: ours.append(args[0])),
            self.attention.register_forward_hook(compare, with_kwargs=True),
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def transfer(
    teacher: PreTrainedModel, student: SaccadeForCausalLM, batches: Batches, config: ConvertConfig, progress: Progress | None = None
) -> None:
    """Stage 1, in place: teach what is new in the student's layers. `progress` gets {stage, step, loss (mean squared error), layers}."""
    new = new_parameters(student)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in new.values():
        parameter.requires_grad_(True)
    device = next(student.parameters()).device

    def step(ids: Tensor) -> dict[str, Any]:
        sums: list[float] = []
        pieces = ids.split(config.rows)
        for rows in pieces:

            def learn(loss: Tensor) -> None:
                (loss * (LOSS_SCALE / len(pieces))).backward()

            found = transfer_losses(teacher, student, rows.to(device), learn)
            sums = [a + b / len(pieces) for a, b in zip(sums or [0.0] * len(found), found, strict=True)]
        return {"loss": sum(sums) / max(1, len(sums)), "layers": [round(x, 8) for x in sums]}

    if new:
        _train("transfer", new, step, batches, config, config.transfer_steps, config.transfer_rate, None, progress)


def tune(
    student: SaccadeForCausalLM, batches: Batches, config: ConvertConfig, progress: Progress | None = None
) -> SaccadeForCausalLM:
    """Stage 2: adapters on q, k, v and o learn the next token, and are merged. `progress` gets {stage, step, loss (nats a token)}."""
    new = new_parameters(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        wrapped = add_adapters(student, config.rank, config.alpha)
    for parameter in new.values():
        parameter.requires_grad_(config.tune_new)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    device = next(student.parameters()).device

    def step(ids: Tensor) -> dict[str, Any]:
        total = 0.0
        for rows in ids.split(config.rows):
            loss = next_token_loss(student, rows.to(device)).mean() * len(rows) / len(ids)
            loss.backward()
            total += loss.item()
        return {"loss": total}

    _train("tune", trained, step, batches, config, config.lora_steps, config.lora_rate, config.clip, progress)
    return wrapped.merge_and_unload().eval()


def convert(teacher: PreTrainedModel, batches: Batches, config: ConvertConfig, progress: Progress | None = None) -> SaccadeForCausalLM:
    """Convert `teacher` on `batches` and write the result to `config.out / "weights"`; a run in that folder goes on.

    The teacher is frozen and otherwise unchanged. ValueError as in `swap`, for a folder with a run of other settings, and where nothing can
    be written: the last good checkpoint then stays.
    """
    student = swap(teacher, config.to, config.pattern, config.seed)
    _claim(config, student)
    asked = [(p, p.requires_grad) for p in teacher.parameters()]
    try:
        teacher.requires_grad_(False)
        transfer(teacher, student, batches, config, progress)
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
    if config.lora_steps:
        # other sequences than those of the first stage
        student = tune(student, lambda step, n: batches(step + config.transfer_steps, n), config, progress)
    with quiet():
        student.save_pretrained(config.out / "weights")
    return student.requires_grad_(False)


def load(folder: str | Path, device: str | torch.device | None = None) -> SaccadeForCausalLM:
    """The converted model that `convert` left in a folder, in eval mode. ValueError when there is none."""
    weights = Path(folder) / "weights"
    if not (weights / "config.json").is_file():
        raise ValueError(f"{folder} holds no converted model: give a folder in which `saccade convert` came to its end")
    with quiet():
        model = SaccadeForCausalLM.from_pretrained(weights, local_files_only=True)
    return model.to(torch.device(device or "cpu")).eval()


def _train(
    stage: str, parameters: Mapping[str, nn.Parameter], step: Callable[[Tensor], dict[str, Any]], batches: Batches, config: ConvertConfig,
    steps: int, rate: float, clip: float | None, progress: Progress | None,
) -> None:  # fmt: skip
    """Run the steps that are left of a stage: its checkpoints hold `parameters`, the optimizer's state and the step."""
    held = nn.ParameterDict({name.replace(".", "/"): p for name, p in parameters.items()})
    optimizer = torch.optim.AdamW(held.values(), lr=rate, weight_decay=0.0)
    folder = config.out / stage
    last = latest_checkpoint(folder)
    begin = 0 if last is None else load_checkpoint(last, held, [optimizer])["step"]
    folder.mkdir(parents=True, exist_ok=True)
    cut_rows(folder / METRICS, begin)
    for index in range(begin, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.55 + 0.45 * math.cos(math.pi * index / steps))
        row = step(batches(index, config.batch))
        if not math.isfinite(row["loss"]):
            raise ValueError(f"the loss of step {index + 1} of the {stage} is {row['loss']}: choose a lower rate, and another folder")
        if clip is not None:
            nn.utils.clip_grad_norm_(held.values(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = {"stage": stage, "step": index + 1, **row}
        append_row(folder / METRICS, row)
        if (index + 1) % config.every == 0 or index + 1 == steps:
            save_checkpoint(folder, index + 1, held, [optimizer], {})
        if progress is not None:
            progress(row)


def _claim(config: ConvertConfig, student: SaccadeForCausalLM) -> None:
    """Write the settings into the folder, or check that those of the run in it are the same."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("out", "rows", "every")}
    facts = {"schema": SCHEMA, "layers": student.config.specs, "settings": settings}
    path = config.out / "convert.json"
    config.out.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != facts:
            raise ValueError(f"{config.out} holds a run with other settings: repeat its command, or choose another folder")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _facts(teacher: PreTrainedModel) -> dict[str, Any]:
    """theta, bias and head_dim of a Llama-like model; ValueError where something in it is built otherwise."""
    config, name = teacher.config, type(teacher).__name__
    if config.model_type not in ("llama", "mistral", "qwen2"):
        raise ValueError(f"{name} can't be converted: give a model of the kind llama, mistral or qwen2")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    odd = {
        "a scaled rotary embedding": rope.get("rope_type", "default") != "default" or "rope_theta" not in rope,
        "an activation other than silu": config.hidden_act != "silu",
        "biases in its feed-forward layers": getattr(config, "mlp_bias", False),
        "a sliding window": bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True),
        "a bias in its output projection": getattr(teacher.model.layers[0].self_attn.o_proj, "bias", None) is not None,
    }
    if found := [what for what, there in odd.items() if there]:
        raise ValueError(f"{name} has {found[0]}, which a converted layer can't have: give another model")
    attention = teacher.model.layers[0].self_attn
    return {"theta": float(rope["rope_theta"]), "bias": attention.q_proj.bias is not None, "head_dim": int(attention.head_dim)}


def _fitted(to: str, facts: Mapping[str, Any]) -> str:
    """The spec with the model's theta and bias where it has such fields and does not give them."""
    mixer = build_mixer(to)
    known = {field.name for field in fields(mixer)}
    given = parse_spec(to)[1] if "&" not in to else {}
    mixer = replace(mixer, **{name: facts[name] for name in ("theta", "bias") if name in known and name not in given})
    probe = mixer.module(MixerShape(dim=4 * facts["head_dim"], heads=4, head_dim=facts["head_dim"]))
    theta = getattr(getattr(probe, "rotary", None), "theta", facts["theta"])
    if theta != facts["theta"]:
        raise ValueError(
            f"{mixer.spec} turns by angles of base {theta:g} and the model by {facts['theta']:g}: convert to lolcats, or give its theta"
        )
    return mixer.spec


def _added(mixer: nn.Module) -> Iterable[str]:
    return (name for name, _ in mixer.named_parameters() if not any(part in PROJECTIONS for part in name.split(".")))


@torch.no_grad()
def _copy(target: Any, source: Any, what: str = "the model") -> None:
    own, given = dict(target.named_parameters()), dict(source.named_parameters())
    if own.keys() != given.keys() or any(own[name].shape != value.shape for name, value in given.items()):
        shapes = [{name: tuple(x.shape) for name, x in one.items()} for one in (given, own)]
        raise ValueError(f"{what} can't take over weights {shapes[0]}, its own are {shapes[1]}: choose another mixer or other fields")
    for name, value in given.items():
        own[name].copy_(value)
