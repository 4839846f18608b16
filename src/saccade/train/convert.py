"""Converting a trained transformer: softmax layers are replaced by mixers that keep its projections, and are taught to do as they did.

1. The model becomes a hybrid decoder (`SaccadeForCausalLM`) with the same weights; chosen layers get the mixer of a spec, which takes over
   q, k, v and o (`saccade.train.swap`).
2. Attention transfer: the trained model runs on text, and every new layer learns, from the input of the layer it stands for, to give the
   same outputs of heads (before the last projection). Layers see the trained model's inputs, never each other's, and only what is
   new in them is trained: maps, factors, gates. Each layer's loss is computed and dropped while the model runs. Mixers that are taught
   whole (minicpm-sala's lightning layers) learn the layer's output with all their weights, the taken-over ones at a tenth of the rate.
3. With the pattern "select" it is then measured which layers should stay as they were (`saccade.train.layer_choice`).
4. Adapters of low rank on q, k, v and o learn to predict the next token; they are then merged.

The result is saved as `OUT/weights`, which any `from_pretrained` loads after `import saccade`. A run that was cut off goes on, by the same
call, to the same numbers.

Sources: lolcats, arXiv 2410.10254, sections 3 and 4; for 3. minicpm-sala, arXiv 2602.11761.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core.files import atomic_write
from saccade.methods import build_mixer
from saccade.models.decoder import SaccadeForCausalLM
from saccade.models.pocket import quiet
from saccade.train.checkpoint import latest_checkpoint, load_checkpoint, reason, save_checkpoint
from saccade.train.extend import Batches, add_adapters, next_token_loss
from saccade.train.layer_choice import CHOICE, Measure, choose_layers, read_choice, selected
from saccade.train.metrics import FILE as METRICS
from saccade.train.metrics import append_row, cut_rows
from saccade.train.swap import learns_whole, new_parameters, swap, taken_over, taught_parameters, teaches

SCHEMA = "saccade.convert/1"
LOSS_SCALE = 1000.0  # on the squared errors of the transfer, as published
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How to convert a model.

    to: the mixer's spec. out: folder for `convert.json`, `weights/`, and checkpoints and `metrics.jsonl` of
    both stages in `transfer/` and `tune/`. pattern: which layers change, as
    `saccade.models.decoder.schedule` reads it: "pure" (all), "3:1", "at:0,7" (all but these); or "select" and "select:3": a quarter, or
    three, stay, chosen by measuring each; default: "select" for a mixer with layers of its own that stay (minicpm-sala), else "pure".
    transfer_steps, lora_steps: of the two stages, 0 leaves one out. transfer_rate, lora_rate: AdamW's, falling to a tenth along a cosine.
    rank, alpha: of the adapters.
    tune_new: train what is new beside the adapters too. batch: sequences a step, of which `rows` are run at a time. every: steps from one
    checkpoint to the next. clip: longest gradient of the second stage. seed: of all that is drawn.
    """

    to: str
    out: Path
    pattern: str | None = None
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

    @property
    def layers(self) -> str:
        """The pattern, also where none was given."""
        return self.pattern or ("select" if hasattr(build_mixer(self.to), "staying") else "pure")


def transfer_losses(teacher: PreTrainedModel, student: SaccadeForCausalLM, ids: Tensor, done: Callable[[Tensor], None]) -> list[float]:
    """The mean squared error of every new layer on `ids (B, N)`, in the layers' order; `done` gets each loss that has a graph.

    It is that of the heads, or of the layer's output where the layer is taught whole. The teacher runs once, without gradients; a layer's
    loss is let go before the next layer runs.
    """
    losses: list[float] = []
    with ExitStack() as hooks, torch.no_grad():
        for block, layer in zip(student.model.stack.blocks, teacher.model.layers, strict=True):
            if teaches(block.mixer):
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
                y, _ = self.mixer(x.detach(), keep=False)
                pair = heads.pop(), ours.pop()
                wanted, found = (out[0], y) if learns_whole(self.mixer) else pair
                loss = (found.float() - wanted.float()).square().mean()
                self.losses.append(loss.item())
                if loss.requires_grad:
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
    taught = taught_parameters(student)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in taught.values():
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

    groups = [
        ({name: p for name, p in taught.items() if not taken_over(name)}, config.transfer_rate),
        ({name: p for name, p in taught.items() if taken_over(name)}, config.transfer_rate / 10),
    ]
    if taught:
        _train("transfer", groups, step, batches, config, config.transfer_steps, None, progress)


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

    _train("tune", [(trained, config.lora_rate)], step, batches, config, config.lora_steps, config.clip, progress)
    return wrapped.merge_and_unload().eval()


def convert(
    teacher: PreTrainedModel, batches: Batches, config: ConvertConfig, progress: Progress | None = None, measure: Measure | None = None
) -> SaccadeForCausalLM:
    """Convert `teacher` on `batches` and write the result to `config.out / "weights"`; a run in that folder goes on.

    The teacher is frozen and otherwise unchanged. measure: what the pattern "select" weighs layers by, such as
    `saccade.evaluate.conversion.judge(...)`. ValueError as in `swap`, for a folder with a run of other settings, and where nothing can
    be written: the last good checkpoint then stays.
    """
    many = selected(config.layers, teacher.config.num_hidden_layers)
    if many is not None and measure is None:
        raise ValueError(f"the pattern {config.layers!r} needs measure=: give saccade.evaluate.conversion.judge(...), or name the layers")
    student = swap(teacher, config.to, config.layers if many is None else "pure", config.seed)
    with _writing("the settings", config.out):
        _claim(config, student)
    asked = [(p, p.requires_grad) for p in teacher.parameters()]
    try:
        teacher.requires_grad_(False)
        transfer(teacher, student, batches, config, progress)
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
    if many is not None and measure is not None:
        student = _with_chosen_layers(teacher, student, config, many, measure, progress)
    if config.lora_steps:
        # other sequences than those of the first stage
        student = tune(student, lambda step, n: batches(step + config.transfer_steps, n), config, progress)
    with _writing("the weights", config.out):
        _save(student, config.out)
    return student.requires_grad_(False)


def _with_chosen_layers(
    teacher: PreTrainedModel, taught: SaccadeForCausalLM, config: ConvertConfig, many: int, measure: Measure, progress: Progress | None
) -> SaccadeForCausalLM:
    """The student of which `many` layers stay, those that `choose_layers` finds; the choice is kept as `layers.json`."""
    path = config.out / CHOICE
    if (kept := read_choice(path)) is None:
        choice = choose_layers(swap(teacher, config.to, "0:1", config.seed), taught, measure, many, progress)
        with _writing(CHOICE, config.out):
            choice.write(path)
        kept = choice.kept
    student = swap(teacher, config.to, f"at:{','.join(map(str, kept))}", config.seed)
    for index, (own, other) in enumerate(zip(student.model.stack.blocks, taught.model.stack.blocks, strict=True)):
        if index not in kept:
            own.mixer.load_state_dict(other.mixer.state_dict())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return student


def _save(student: SaccadeForCausalLM, out: Path) -> None:
    """Write `out / "weights"` under another name first, so that what is found there is whole."""
    partial, old = out / ".weights.partial", out / ".weights.old"
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with quiet():
            student.save_pretrained(partial)
        if (out / "weights").exists():
            os.replace(out / "weights", old)
        os.replace(partial, out / "weights")
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(what: str, out: Path) -> Iterator[None]:
    """Around a write: what fails becomes one sentence that says what is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = latest_checkpoint(out / "tune") or latest_checkpoint(out / "transfer")
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        raise ValueError(
            f"{what} can't be written to {out} ({reason(error)}): free some space or choose another folder, and start again; {kept}"
        ) from error


def load(folder: str | Path, device: str | torch.device | None = None) -> SaccadeForCausalLM:
    """The converted model that `convert` left in a folder, in eval mode. ValueError when there is none."""
    weights = Path(folder) / "weights"
    if not (weights / "config.json").is_file():
        raise ValueError(f"{folder} holds no converted model: give a folder in which `saccade convert` came to its end")
    with quiet():
        model = SaccadeForCausalLM.from_pretrained(weights, local_files_only=True)
    return model.to(torch.device(device or "cpu")).eval()


def _train(
    stage: str, groups: Sequence[tuple[Mapping[str, nn.Parameter], float]], step: Callable[[Tensor], dict[str, Any]], batches: Batches,
    config: ConvertConfig, steps: int, clip: float | None, progress: Progress | None,
) -> None:  # fmt: skip
    """Run the steps that are left of a stage: its checkpoints hold the parameters of all groups, the optimizer's state and the step.

    groups: parameters by name, and their rate.
    """
    groups = [(parameters, rate) for parameters, rate in groups if parameters]
    held = nn.ParameterDict({name.replace(".", "/"): p for parameters, _ in groups for name, p in parameters.items()})
    optimizer = torch.optim.AdamW([{"params": list(parameters.values()), "lr": rate} for parameters, rate in groups], weight_decay=0.0)
    folder = config.out / stage
    last = latest_checkpoint(folder)
    begin = 0 if last is None else load_checkpoint(last, held, [optimizer])["step"]
    with _writing(METRICS, config.out):
        folder.mkdir(parents=True, exist_ok=True)
        cut_rows(folder / METRICS, begin)
    for index in range(begin, steps):
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * (0.55 + 0.45 * math.cos(math.pi * index / steps))
        row = step(batches(index, config.batch))
        if not math.isfinite(row["loss"]):
            raise ValueError(f"the loss of step {index + 1} of the {stage} is {row['loss']}: choose a lower rate, and another folder")
        if clip is not None:
            nn.utils.clip_grad_norm_(held.values(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = {"stage": stage, "step": index + 1, **row}
        with _writing(METRICS, config.out):
            append_row(folder / METRICS, row)
        if (index + 1) % config.every == 0 or index + 1 == steps:
            save_checkpoint(folder, index + 1, held, [optimizer], {})
        if progress is not None:
            progress(row)


def _claim(config: ConvertConfig, student: SaccadeForCausalLM) -> None:
    """Write the settings into the folder, or check that those of the run in it are the same."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("out", "rows", "every")}
    settings["pattern"] = config.layers
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
