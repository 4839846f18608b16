"""`saccade calibrate METHOD`: the offline part of a method, written to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from saccade.core import Method
    from saccade.evaluate.prompts import Codec


def command(
    method: Annotated[str, typer.Argument(help="A method with an offline or a trained part: minference, 'loki(dims=0.5)', duoattention.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan to write, a .safetensors file.")],
    model: Annotated[
        str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")
    ] = "pocket",
    data: Annotated[Path | None, typer.Option(help="A UTF-8 text file to calibrate on; the text that comes with saccade.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of each sample.")] = 2048,
    batches: Annotated[int | None, typer.Option(help="Samples, one a training step where parts are trained; 2, or 100 steps.")] = None,
    seed: Annotated[int, typer.Option(help="Decides where in the text the samples are cut.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Run a method's offline part, or train its parts, on samples of text and write what it finds to a plan for --plan and attach(plan=).

    Stopped half-way, it leaves its statistics in OUT.partial.safetensors; the same command then goes on after the last whole sample.
    """
    from dataclasses import replace

    from saccade.cli.console import console
    from saccade.core import Calibrated
    from saccade.core.files import check_writable
    from saccade.methods import build

    # everything that can be wrong with the arguments is said before the model is loaded
    chosen = build(method)
    trained = "training" in chosen.info.needs and "calibration" in chosen.info.needs and not isinstance(chosen, Calibrated)
    if not trained and not isinstance(chosen, Calibrated):
        raise ValueError(f"{chosen.info.slug} has no offline part: use it without a plan")
    batches = (100 if trained else 2) if batches is None else batches
    check_writable(out)
    partial = check_writable(out.with_name(f"{out.name}.partial.safetensors"))
    for name, value, least in (("--length", length, 2), ("--batches", batches, 1)):
        if value < least:
            raise ValueError(f"{name} {value} is too small: give at least {least}")
    from saccade.evaluate.text import read_text, shipped_text

    text = shipped_text() if data is None else read_text(data)

    from saccade.attach import calibrate
    from saccade.evaluate.loading import load_model
    from saccade.evaluate.prompts import Codec

    loaded, tokenizer = load_model(model, device=device, dtype=dtype, offline=offline)
    longest = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"--length {length} is more than the {longest} positions of {model}: give at most {longest}")
    if trained:
        _train(chosen, loaded, Codec(tokenizer), out, length=length, steps=batches, seed=seed, data=data)
        return
    samples = cut_samples(Codec(tokenizer), text, length=length, count=batches, seed=seed)
    source = {"seed": seed, "length": length, "text": "shipped" if data is None else data.name}
    try:
        with _bar(f"calibrating {chosen.info.slug}", batches, resumed=partial.exists()) as show:
            plan = calibrate(loaded, chosen, samples, progress=show, partial=partial, arguments={**source, "batches": batches})
    except KeyboardInterrupt:
        if partial.exists():
            told = f"Stopped. What was measured is in {partial}; the same command goes on."
            console(stderr=True).print(told, markup=False, soft_wrap=True)
        raise
    replace(plan, notes={**plan.notes, **source}).save(out)
    partial.unlink(missing_ok=True)
    console().print(f"plan: {out}", soft_wrap=True)


def _train(
    chosen: Method, model: PreTrainedModel, codec: Codec, out: Path, *, length: int, steps: int, seed: int, data: Path | None
) -> None:
    """Train the parts of a method and write its plan."""
    from dataclasses import replace

    from saccade.cli.console import console
    from saccade.evaluate.text import grammar
    from saccade.train.recipes import train_plan

    with _bar(f"training {chosen.info.slug}", steps, resumed=False) as show:
        plan = train_plan(
            model, chosen, grammar(data), codec.encode, prefix=codec.prefix, length=length, steps=steps, seed=seed, progress=show
        )
    source = {"seed": seed, "length": length, "text": "shipped" if data is None else data.name}
    replace(plan, notes={**plan.notes, **source}).save(out)
    console().print(f"plan: {out}", soft_wrap=True)


@contextmanager
def _bar(what: str, total: int, *, resumed: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, as a function of the number of samples done; with `resumed` its first call tells of an earlier run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from saccade.cli.console import console

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    err = console(stderr=True)
    # in a file or a pipe a bar would only leave an empty line
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        calls = 0

        def show(done: int) -> None:
            nonlocal calls
            calls += 1
            if resumed and calls == 1:
                # what an earlier run did took no time now and would make the rest look short
                bars.reset(task, completed=done)
            else:
                bars.update(task, completed=done)

        yield show


def cut_samples(codec: Codec, text: bytes, *, length: int, count: int, seed: int) -> list[Tensor]:
    """`count` samples of `length` tokens, `(1, length)` int64 each, from places in the text that the seed decides.

    Each begins with the tokenizer's own first tokens. Raises ValueError when the text has fewer tokens than a sample.
    """
    from random import Random

    import torch

    rng = Random(seed)
    wanted = length - len(codec.prefix)
    if wanted < 1:
        raise ValueError(f"--length {length} leaves no room after the tokenizer's {len(codec.prefix)} first tokens: give more")
    start = text[: min(len(text), 4096)]
    per_token = len(start) / max(1, len(codec.encode(start)))
    samples = []
    for _ in range(count):
        # a quarter more than the beginning of the text suggests, and twice as much for as long as that is too little
        size = int(1.25 * per_token * wanted) + 1
        begin = rng.randrange(max(1, len(text) - size))
        while len(ids := codec.encode(text[begin : begin + size])) < wanted:
            if size >= len(text):
                raise ValueError(
                    f"the text has {len(ids)} tokens, fewer than a sample of {length}: give a longer text as --data or a smaller --length"
                )
            size *= 2
            begin = max(0, min(begin, len(text) - size))
        samples.append(torch.tensor([[*codec.prefix, *ids[:wanted]]]))
    return samples
