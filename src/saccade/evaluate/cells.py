"""One cell of a comparison, and what is made once for many: calibrations, errors by layer, the picture."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import attach, calibrate
from saccade.core import Plan
from saccade.evaluate import result as results
from saccade.evaluate.contenders import Contender
from saccade.evaluate.decoding import Mode, Outcome, run_sample
from saccade.evaluate.fidelity import Fidelity, measure
from saccade.evaluate.memory import Peak
from saccade.evaluate.picture import LENGTH as PICTURE_LENGTH
from saccade.evaluate.picture import picture
from saccade.evaluate.prompts import Codec, Prompt, prompt_of
from saccade.evaluate.tasks import Task, build
from saccade.train.text import Grammar

CALIBRATION = (4, 1024)  # sequences of the text, tokens of each
NO_MAPS = "no attention maps"
WARM_UP = 256  # tokens of the prompt that is run once before a method is timed on a CPU


@dataclass(frozen=True)
class Spot:
    """What the cells of one run share. warmed: the methods and lengths that have run once, so that clocks may count."""

    model: PreTrainedModel
    codec: Codec
    grammar: Grammar
    mode: Mode
    seed: int
    warmed: set[tuple[str, int]]

    def prompt(self, task: Task, length: int, index: int) -> Prompt:
        """Sample `index` of a task at `length` tokens."""
        return prompt_of(task, self.codec, self.grammar, length=length, seed=self.seed, index=index)

    def closed(self, prompt: Prompt) -> int:
        """Tokens of a prompt that a cache policy knows when it acts."""
        return len(prompt.context) if self.mode == "agnostic" else prompt.length


@contextmanager
def swept_heap() -> Iterator[None]:
    """Inside, collecting garbage looks at new objects only, so that it can be done before every sample.

    Caches are held in cycles: one that is not collected would count as memory that the next sample starts with.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def prepared(line: list[Contender], spot: Spot, plans: Iterable[Plan], needed: set[str], tell: Callable[[str], None]) -> list[Contender]:
    """The line-up with its calibration plans: those given, and one made on the text for each method that lacks one."""
    found = {plan.slug: plan for plan in plans}
    ready = []
    for contender in line:
        own, note, broken = [], None, None
        for method in contender.members:
            slug = method.info.slug
            if slug in found:
                own.append(found[slug])
            elif "calibration" in method.info.needs and contender.spec in needed:
                tell(f"calibrating {slug}")
                sequences, tokens = CALIBRATION
                note = f"calibrated on {sequences} x {tokens} tokens of the text"
                try:
                    own.append(calibrate(spot.model, method, _calibration_batches(spot)))
                except Exception as error:  # recorded in every row of this method; the others go on
                    broken = sentence(error)
        ready.append(replace(contender, plans=own, note=note, broken=broken))
    return ready


def _calibration_batches(spot: Spot) -> list[torch.Tensor]:
    sequences, tokens = CALIBRATION
    task = build("text")
    # far from the indices of samples, whose texts these must not be
    return [torch.tensor([spot.prompt(task, tokens, 1_000_000 + i).context]) for i in range(sequences)]


def run_cell(
    row: dict[str, Any],
    spot: Spot,
    contender: Contender,
    task: Task,
    prompts: list[Prompt],
    tell: Callable[[int], None],
) -> None:
    """Run one cell and fill its row; a failure is written into it."""
    device = next(spot.model.parameters()).device
    meter = Peak(device)
    outcomes: list[Outcome] = []
    peaks: list[int | None] = []
    try:
        if contender.broken:
            raise ValueError(contender.broken)
        methods: dict[str, Any] = dict(contender.methods)
        # dense attention is the model as it is, with nothing attached
        block = attach(spot.model, **methods, plan=contender.plans, seed=spot.seed) if methods else nullcontext()
        with block as handle:
            # kernels compile for the length they meet; a CPU only needs its threads and pages
            size = prompts[0].length if device.type == "cuda" else min(WARM_UP, prompts[0].length)
            if (contender.spec, size) not in spot.warmed:
                first = prompts[0]
                short = replace(first, context=first.context[: max(1, size - len(first.question))])
                run_sample(spot.model, spot.codec, short, spot.mode, handle)
                spot.warmed.add((contender.spec, size))
            for index, prompt in enumerate(prompts):
                tell(index + 1)
                gc.collect()
                meter.start()
                outcomes.append(run_sample(spot.model, spot.codec, prompt, spot.mode, handle))
                peaks.append(meter.stop())
        results.fill_row(row, task, outcomes, [prompt.sample.depths for prompt in prompts], peaks, spot.seed)
    except Exception as error:  # the other cells go on
        row["error"] = contender.broken or sentence(error)


def fidelity_of(spot: Spot, task: Task, length: int, contenders: Sequence[Contender]) -> dict[str, Fidelity]:
    """Errors by layer on sample 0 followed by its right answer; none where that fails for all."""
    try:
        prompt = spot.prompt(task, length, 0)
        answer = spot.codec.encode(prompt.sample.answers[0])
        return measure(spot.model, [*prompt.context, *prompt.question, *answer], spot.closed(prompt), contenders)
    except Exception as error:
        return {contender.spec: Fidelity(broken=sentence(error)) for contender in contenders if not contender.dense}


def add_fidelity(row: dict[str, Any], found: Fidelity | None) -> None:
    """Put errors and masses into a row, or the reason why there are none."""
    if found is None:
        return
    if found.broken:
        row["note"] = "; ".join(filter(None, [row["note"], f"no errors by layer: {found.broken}"]))
    else:
        row["output_error"], row["mass"] = found.output_error, found.mass


def note_lengths(row: dict[str, Any], spot: Spot, prompts: Sequence[Prompt], length: int) -> None:
    """Say what is unusual about the prompts."""
    notes = [row["note"]] if row["note"] else []
    off = min(prompt.length for prompt in prompts)
    if off != length:
        notes.append(f"no text of exactly {length} tokens was found: prompts have {off} or more")
    limit = getattr(spot.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and length > limit:
        notes.append(f"longer than the {limit} positions the model was made for")
    row["note"] = "; ".join(notes) or None


def draw(result: dict[str, Any], spot: Spot, contenders: Sequence[Contender]) -> None:
    """Maps of a needle prompt with its needle in the middle; a reason in "notes" for a model that can't be attached."""
    result["notes"] = [note for note in result["notes"] if not note.startswith(NO_MAPS)]
    try:
        task = build("needle(depths=(0.5,))")
        prompt = spot.prompt(task, PICTURE_LENGTH, 0)
        text = prompt.sample.context[:400].decode("utf-8", errors="replace")
        ids = [*prompt.context, *prompt.question]
        result["attention"] = picture(spot.model, ids, spot.closed(prompt), contenders, text)
    except Exception as error:  # the rows are what the run is for
        result["notes"].append(f"{NO_MAPS}: {sentence(error)}")


def sentence(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__
