"""`saccade convert`: a trained model's attention becomes another mixer, is taught to do as before, and what that cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from saccade.evaluate.conversion import Measured

COLUMNS = ("model", "bits per byte", "needle", "state bytes", "decode ms")


def command(
    to: Annotated[str, typer.Option("--to", help="The mixer, such as 'lolcats(window=64)'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result; a run in it goes on by the same command.")],
    model: Annotated[str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")] = "pocket",
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Which change: pure (all), 3:1 (all but every fourth), at:0,7 (all but these), bookend:1, select or select:3 (all but a "
            "quarter, or three, chosen by measuring each). Default: pure; select for minicpm-sala.",
        ),
    ] = None,
    transfer: Annotated[int, typer.Option("--transfer", help="Steps of the attention transfer.", min=0)] = 200,
    tune: Annotated[int, typer.Option("--tune", help="Steps with adapters of low rank.", min=0)] = 200,
    transfer_rate: Annotated[float, typer.Option("--transfer-rate", help="Learning rate of the transfer.")] = 1e-2,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of the adapters.")] = 1e-4,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the adapters; alpha is twice that.", min=1)] = 8,
    context: Annotated[int, typer.Option("--context", help="Tokens of a training sequence.", min=64)] = 512,
    batch: Annotated[int, typer.Option("--batch", help="Sequences a step.", min=1)] = 8,
    rows: Annotated[int | None, typer.Option("--rows", help="Sequences that are run at a time; all by default.", min=1)] = None,
    data: Annotated[Path | None, typer.Option("--data", help="A UTF-8 text to train on; Python sources by default.")] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of the texts on which both models are scored.", min=256)] = 1024,
    samples: Annotated[int, typer.Option("--samples", help="Texts and needles on which both are scored.", min=1)] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Decides all that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Replace the attention of a trained model by another mixer, teach it, and compare: bits per byte, needles, state, speed.

    The result is in OUT/weights (any `from_pretrained` loads it after `import saccade`), the comparison in OUT/report.json. "untaught" is
    the converted model before any training, with every layer converted where layers are chosen.
    """
    from saccade.core.files import atomic_write, check_writable
    from saccade.train.convert import ConvertConfig
    from saccade.train.layer_choice import selected

    config = ConvertConfig(
        to=to, out=out, pattern=layers, transfer_steps=transfer, lora_steps=tune, transfer_rate=transfer_rate, lora_rate=rate, rank=rank,
        alpha=2 * rank, batch=batch, rows=rows or batch, seed=seed,
    )  # fmt: skip
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the result")
    check_writable(out / "convert.json" if out.is_dir() else out)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console, write
    from saccade.evaluate.conversion import judge, lessons, measure
    from saccade.evaluate.loading import load_model
    from saccade.evaluate.text import read_text, words
    from saccade.train.convert import convert
    from saccade.train.corpus import load_corpus
    from saccade.train.swap import swap

    teacher, tokenizer = load_model(model, device=device, dtype="float32", offline=offline)
    chosen = selected(config.layers, teacher.config.num_hidden_layers)
    untaught = swap(teacher, to, "pure" if chosen is not None else config.layers, seed)
    text = load_corpus(8.0)[0] if data is None else read_text(data)
    batches = lessons(tokenizer, text, words(text), context, seed)

    def scored(one: Any) -> Measured:
        return measure(one, tokenizer, length=length, samples=samples, seed=seed)

    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("scoring the model", total=transfer + tune)
        found = {"before": scored(teacher), "untaught": scored(untaught)}
        del untaught

        def show(row: dict[str, Any]) -> None:
            if row["stage"] == "choice":
                bar.update(task, description=f"layer {row['layer']}  recall {row['recall']:.2f}")
                return
            done = row["step"] + (transfer if row["stage"] == "tune" else 0)
            bar.update(task, completed=done, description=f"{row['stage']}  loss {row['loss']:.4f}")

        weigh = None if chosen is None else judge(tokenizer, length=length, samples=samples, seed=seed)
        student = convert(teacher, batches, config, show, weigh)
        bar.update(task, completed=transfer + tune, description="scoring the result")
        found["after"] = scored(student)
    tokenizer.save_pretrained(out / "weights")
    with atomic_write(out / "report.json") as temporary:
        report = {
            "schema": "saccade.conversion/1", "model": model, "layers": student.config.specs, "length": length, "samples": samples,
            "rows": {name: asdict(row) for name, row in found.items()},
        }  # fmt: skip
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write(_table(found, length))
    if chosen is not None:
        kept = json.loads((out / "layers.json").read_text(encoding="utf-8"))["kept"]
        write(f"layers that stay: {', '.join(map(str, kept))} (measured in {out / 'layers.json'})")
    write(f"model: {out / 'weights'}")


def _table(found: dict[str, Measured], length: int) -> Table:
    from rich.table import Table

    table = Table(*COLUMNS, title=f"at {length} tokens", title_justify="left")
    for name, row in found.items():
        table.add_row(name, f"{row.bits:.3f}", f"{row.needle:.2f}", f"{row.state_bytes:,}", f"{row.decode_ms:.2f}")
    return table
