"""`saccade gallery`: a picture of what each method reads, on the same attention maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("gallery"),
    methods: Annotated[str | None, typer.Option(help="Specs, separated by semicolons; every method that runs here.")] = None,
    model: Annotated[str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")] = "pocket",
    seed: Annotated[int, typer.Option(help="Decides the prompt.")] = 0,
    plan: Annotated[list[Path] | None, typer.Option(help="A calibrated or trained plan; may be given more than once.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Draw what each method reads of the same heads: one PNG a method and a page, index.md."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.catalog import catalog, find
    from saccade.cli.console import console
    from saccade.core import Plan
    from saccade.evaluate import gallery
    from saccade.evaluate.contenders import split_methods
    from saccade.evaluate.loading import load_model
    from saccade.evaluate.picture import LENGTH
    from saccade.evaluate.prompts import Codec, prompt_of
    from saccade.evaluate.tasks import build as build_task
    from saccade.evaluate.text import grammar
    from saccade.methods import build
    from saccade.report.gallery import Entry, write_gallery

    if methods is None:
        specs = [gallery.shown(row.slug) for row in catalog().values() if row.done and row.slug != "dense" and gallery.drawn(row.slug)]
    else:
        specs = [build(spec).spec for spec in split_methods(methods)]
    loaded, tokenizer = load_model(model, device=device, offline=offline)
    prompt = prompt_of(build_task("needle"), Codec(tokenizer), grammar(), length=LENGTH, seed=seed, index=0)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=len(specs))
        found, failed = gallery.maps(
            loaded, [*prompt.context, *prompt.question], specs, tell=lambda spec: bars.update(bar, description=spec, advance=1),
            plans=[Plan.load(path) for path in plan or []],
        )  # fmt: skip
    entries = []
    for spec, heads in found.items():
        row = find(spec.split("(")[0])
        entries.append(Entry(slug=row.slug, spec=spec, family=row.family, about=row.claim, url=row.url, heads=heads))
    caption = (
        f"Four heads of {model} on a needle prompt of {LENGTH} tokens: queries run down, keys run across. Dark: attention that is read. "
        "Grey: attention that is missed. Pale blue: read, with little attention there. Settings are those of the quality tables that aim "
        "at a fifth of the pairs (prefill) or a quarter of the cache; what a method really reads here stands below its picture. Of "
        "a cache policy the picture shows what is left when the prompt has ended, in every row; of a decode method what each row's last "
        "query reads."
    )
    made = f"saccade gallery --out {out.as_posix()}" + (f" --model {model}" if model != "pocket" else "")
    made += f" --methods '{methods}'" if methods else ""
    path = write_gallery(sorted(entries, key=lambda entry: (entry.family, entry.slug)), out, caption=caption, command=made, absent=failed)
    for spec, reason in failed.items():
        console(stderr=True).print(f"left out {spec}: {reason}", soft_wrap=True)
    console().print(f"gallery: {path}", soft_wrap=True)
