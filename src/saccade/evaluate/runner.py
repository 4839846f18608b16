"""compare: every method on every task and length, next to dense attention and random eviction, on the same prompts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import attach, calibrate
from saccade.core import Plan
from saccade.core.files import check_writable
from saccade.evaluate import result as results
from saccade.evaluate.contenders import Contender, line_up
from saccade.evaluate.decoding import MODES, Mode, Outcome, run_sample
from saccade.evaluate.fidelity import LONGEST, Fidelity, measure
from saccade.evaluate.memory import Peak
from saccade.evaluate.picture import LENGTH as PICTURE_LENGTH
from saccade.evaluate.picture import picture
from saccade.evaluate.prompts import Codec, Prompt, check_length, prompt_of
from saccade.evaluate.tasks import Task, build, spec_of
from saccade.evaluate.text import grammar as text_grammar
from saccade.train.text import Grammar

CALIBRATION = (4, 1024)  # sequences of the text, tokens of each
NO_MAPS = "no attention maps"
WARM_UP = 256  # tokens of the prompt that is run once before a method is timed on a CPU


@dataclass(frozen=True)
class Progress:
    """What a run is doing. done, total: cells. sample, samples: inside the cell. doing: its method, task and length."""

    done: int
    total: int
    doing: str
    sample: int = 0
    samples: int = 0


@dataclass(frozen=True)
class Spot:
    """What the cells of one run share."""

    model: PreTrainedModel
    codec: Codec
    grammar: Grammar
    mode: Mode
    seed: int
    samples: int


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[str],
    tasks: Sequence[str | Task],
    lengths: Sequence[int],
    samples: int = 8,
    mode: str = "aware",
    seed: int = 0,
    json_path: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    *,
    plans: Iterable[Plan] = (),
    floor: bool = True,
    text: str | Path | None = None,
    fidelity: bool = True,
    attention: bool = True,
    name: str | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare methods and return the result, a dict of schema "saccade.compare/1" (docs/compare-schema.md).

    methods: specs such as "snapkv(budget=0.25)" or "minference+snapkv"; dense always joins, and so does the
    random-eviction floor where some method works on the cache (unless `floor` is off). tasks: names or specs.
    lengths: prompt tokens.
    mode: "aware" compresses prompt and question together, "agnostic" the context before the question is seen.
    All methods see the same prompts, which depend on seed, task, length and index alone.

    json_path: saved there after every cell, whole at any time. resume: go on with that file: cells that are ok in it
    stay.
    plans: calibrations; a method that needs one and has none is calibrated once on the text. text: a file to make
    prompts of, in place of the shipped text. fidelity, attention: whether to measure errors by layer and draw one
    prompt's maps.
    name: the model's name in the result. options: arguments to repeat in the rows' commands.

    A cell that fails is recorded with its reason and the rest goes on. Raises ValueError, before anything runs, on
    unknown methods or tasks, lengths below a task's minimum, numbers out of range and files that can't be written.
    """
    check_settings(tasks, lengths, samples, mode)
    spot = Spot(model, Codec(tokenizer), text_grammar(text), "aware" if mode == "aware" else "agnostic", seed, samples)
    chosen = list({spec_of(task): task for task in map(build, tasks)}.values())
    lengths = sorted(set(lengths))
    for task in chosen:
        for length in lengths:
            check_length(task, spot.codec, spot.grammar, length)
    line = line_up(methods, lengths, floor=floor)
    if resume and json_path is None:
        raise ValueError("there is no file to resume: give the one that the run writes (json_path, --json)")
    if json_path is not None:
        check_writable(json_path)

    settings = {
        "tasks": [spec_of(task) for task in chosen], "lengths": lengths, "samples": samples, "mode": mode, "seed": seed,
        "text": None if text is None else str(text), "methods": [contender.spec for contender in line],
    }  # fmt: skip
    label = name or str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    named = [contender.spec for contender in line if not contender.dense] or ["dense"]

    def command(specs: Sequence[str], tasks: Sequence[str], lengths: Sequence[int]) -> str:
        return results.command_of(label, specs, tasks, lengths, settings, options)

    result = results.new_result(
        settings,
        results.describe_model(model, label),
        results.environment(model),
        command(named, settings["tasks"], lengths),
    )
    if resume and json_path is not None and Path(json_path).exists():
        _take_over(result, results.load(json_path), json_path)
    kept = {results.key_of(row): row for row in result["rows"] if row["status"] == "ok"}
    cells = [(c, t, n) for t in chosen for n in lengths for c in line]
    missing = [cell for cell in cells if (cell[0].spec, spec_of(cell[1]), cell[2], mode) not in kept]
    done = len(cells) - len(missing)

    def tell(doing: str, sample: int = 0) -> None:
        if progress is not None:
            progress(Progress(done, len(cells), doing, sample, samples if sample else 0))

    line = _prepared(line, spot, plans, {contender.spec for contender, _, _ in missing}, tell)
    by_spec = {contender.spec: contender for contender in line}
    todo = {(contender.spec, spec_of(task), length) for contender, task, length in missing}
    warmed: set[tuple[str, int]] = set()
    near: dict[tuple[str, int], dict[str, Fidelity]] = {}
    for task in chosen:
        for length in lengths:
            here = [contender for contender in line if (contender.spec, spec_of(task), length) in todo]
            if not here:
                continue
            prompts = [
                prompt_of(task, spot.codec, spot.grammar, length=length, seed=seed, index=index)
                for index in range(samples)
            ]
            short = (spec_of(task), min(length, LONGEST))
            if fidelity and short not in near:
                tell(f"errors by layer, {spec_of(task)} at {short[1]}")
                near[short] = _fidelity(spot, task, short[1], [c for c in line if not c.broken])
            for contender in here:
                doing = f"{contender.spec}, {spec_of(task)} at {length}"
                tell(doing)
                row = results.blank_row(
                    by_spec[contender.spec], task, length, mode, command([contender.spec], [spec_of(task)], [length])
                )
                _cell(row, spot, contender, task, prompts, warmed, lambda sample, doing=doing: tell(doing, sample))
                _attach_fidelity(row, near.get(short, {}).get(contender.spec))
                _note_lengths(row, spot, prompts, length)
                _put(result, row)
                _relate(result, task, length, mode)
                done += 1
                if json_path is not None:
                    results.save(result, json_path)
                tell(doing)
    if attention and (result["attention"] is None or missing):
        tell("attention maps")
        _draw(result, spot, [contender for contender in line if not contender.broken])
    if json_path is not None:
        results.save(result, json_path)
    return result


def check_settings(tasks: Sequence[str | Task], lengths: Sequence[int], samples: int, mode: str) -> None:
    """Raise ValueError for settings that no model could run."""
    if mode not in MODES:
        raise ValueError(
            f"mode {mode!r} is unknown: use aware (the question is compressed too) or agnostic (it comes after)"
        )
    for what, value in (("samples", samples), *(("each length", length) for length in lengths)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")
    if not tasks or not lengths:
        raise ValueError("nothing to run: give at least one task and one length")
    for task in tasks:
        build(task)


def _take_over(result: dict[str, Any], old: dict[str, Any], path: str | Path) -> None:
    """Rows and maps of an earlier file move into `result`, when its settings allow it."""
    results.check_resumable(old, result, path)
    result["rows"] = list(old["rows"])
    result["attention"], result["notes"] = old.get("attention"), list(old.get("notes", []))
    result["created"] = old.get("created", result["created"])
    for name in ("tasks", "lengths", "methods"):
        before = old["settings"].get(name, [])
        result["settings"][name] = [*before, *(value for value in result["settings"][name] if value not in before)]


def _prepared(
    line: list[Contender], spot: Spot, plans: Iterable[Plan], needed: set[str], tell: Callable[[str], None]
) -> list[Contender]:
    """The line-up with its calibration plans: those given, and one made on the text for each method that lacks one."""
    found = {plan.slug: plan for plan in plans}
    ready = []
    for contender in line:
        own, note, broken = [], None, None
        for method in contender.methods.values():
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
                    broken = _sentence(error)
        ready.append(replace(contender, plans=own, note=note, broken=broken))
    return ready


def _calibration_batches(spot: Spot) -> list[torch.Tensor]:
    sequences, tokens = CALIBRATION
    task = build("text")
    made = [
        prompt_of(task, spot.codec, spot.grammar, length=tokens, seed=spot.seed, index=1_000_000 + i)
        for i in range(sequences)
    ]
    return [torch.tensor([prompt.context]) for prompt in made]


def _cell(
    row: dict[str, Any], spot: Spot, contender: Contender, task: Task, prompts: list[Prompt],
    warmed: set[tuple[str, int]], tell: Callable[[int], None],
) -> None:  # fmt: skip
    """Run one cell and fill its row; a failure is written into it."""
    device = next(spot.model.parameters()).device
    meter = Peak(device)
    outcomes: list[Outcome] = []
    peaks: list[int | None] = []
    gc.collect()
    try:
        if contender.broken:
            raise ValueError(contender.broken)
        methods: dict[str, Any] = dict(contender.methods)
        # dense attention is the model as it is, with nothing attached
        block = attach(spot.model, **methods, plan=contender.plans, seed=spot.seed) if methods else nullcontext()
        with block as handle:
            # kernels compile for the length they meet; a CPU only needs its threads and pages
            size = prompts[0].length if device.type == "cuda" else min(WARM_UP, prompts[0].length)
            if (contender.spec, size) not in warmed:
                first = prompts[0]
                short = replace(first, context=first.context[: max(1, size - len(first.question))])
                run_sample(spot.model, spot.codec, short, spot.mode, handle)
                warmed.add((contender.spec, size))
            for index, prompt in enumerate(prompts):
                tell(index + 1)
                meter.start()
                outcomes.append(run_sample(spot.model, spot.codec, prompt, spot.mode, handle))
                peaks.append(meter.stop())
        results.fill_row(row, task, outcomes, [prompt.sample.depths for prompt in prompts], peaks, spot.seed)
    except Exception as error:  # the other cells go on
        row["error"] = contender.broken or _sentence(error)


def _fidelity(spot: Spot, task: Task, length: int, contenders: Sequence[Contender]) -> dict[str, Fidelity]:
    """Errors by layer on sample 0 followed by its right answer; none where that fails for all."""
    try:
        prompt = prompt_of(task, spot.codec, spot.grammar, length=length, seed=spot.seed, index=0)
        answer = spot.codec.encode(prompt.sample.answers[0])
        closed = len(prompt.context) if spot.mode == "agnostic" else prompt.length
        return measure(spot.model, [*prompt.context, *prompt.question, *answer], closed, contenders)
    except Exception as error:
        return {contender.spec: Fidelity(broken=_sentence(error)) for contender in contenders if not contender.dense}


def _attach_fidelity(row: dict[str, Any], found: Fidelity | None) -> None:
    if found is None:
        return
    if found.broken:
        row["note"] = "; ".join(filter(None, [row["note"], f"no errors by layer: {found.broken}"]))
    else:
        row["output_error"], row["mass"] = found.output_error, found.mass


def _note_lengths(row: dict[str, Any], spot: Spot, prompts: Sequence[Prompt], length: int) -> None:
    """Say what is unusual about the prompts."""
    notes = [row["note"]] if row["note"] else []
    off = min(prompt.length for prompt in prompts)
    if off != length:
        notes.append(f"no text of exactly {length} tokens was found: prompts have {off} or more")
    limit = getattr(spot.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and length > limit:
        notes.append(f"longer than the {limit} positions the model was made for")
    row["note"] = "; ".join(notes) or None


def _put(result: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row, in place of an earlier one of the same cell."""
    rows = result["rows"]
    places = [i for i, old in enumerate(rows) if results.key_of(old) == results.key_of(row)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)


def _relate(result: dict[str, Any], task: Task, length: int, mode: str) -> None:
    """Bring the rows of one task and length into relation with their dense row."""
    rows = [row for row in result["rows"] if (row["task"], row["length"], row["mode"]) == (spec_of(task), length, mode)]
    dense = next((row for row in rows if row["method"] == "dense"), None)
    for row in rows:
        results.relate(row, dense, task)


def _draw(result: dict[str, Any], spot: Spot, contenders: Sequence[Contender]) -> None:
    """Maps of a needle prompt with its needle in the middle; a reason in "notes" for a model that can't be attached."""
    result["notes"] = [note for note in result["notes"] if not note.startswith(NO_MAPS)]
    try:
        task = build("needle(depths=(0.5,))")
        prompt = prompt_of(task, spot.codec, spot.grammar, length=PICTURE_LENGTH, seed=spot.seed, index=0)
        closed = len(prompt.context) if spot.mode == "agnostic" else prompt.length
        text = prompt.sample.context[:400].decode("utf-8", errors="replace")
        result["attention"] = picture(spot.model, [*prompt.context, *prompt.question], closed, contenders, text)
    except Exception as error:  # the rows are what the run is for
        result["notes"].append(f"{NO_MAPS}: {_sentence(error)}")


def _sentence(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__
