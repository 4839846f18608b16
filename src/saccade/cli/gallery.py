"""`saccade gallery`: a picture of what each method reads, or of what its storage changes, on the same attention maps."""

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
    """Draw what each method reads of the same heads, or what its storage changes: one PNG a method and a page, index.md.

    Trained parts without a plan are trained for some steps on short texts, which takes a minute a method."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.catalog import catalog, find
    from saccade.cli.console import console
    from saccade.core import Plan
    from saccade.evaluate import gallery
    from saccade.evaluate.contenders import split_methods
    from saccade.evaluate.gallery_encoded import FULL_BITS
    from saccade.evaluate.loading import load_model
    from saccade.evaluate.picture import LENGTH
    from saccade.evaluate.planning import Plans
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
    codec, text = Codec(tokenizer), grammar()
    prompt = prompt_of(build_task("needle"), codec, text, length=LENGTH, seed=seed, index=0)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=len(specs))
        found = gallery.maps(
            loaded, [*prompt.context, *prompt.question], specs, tell=lambda spec: bars.update(bar, description=spec, advance=1),
            plans=[Plan.load(path) for path in plan or []], maker=Plans(loaded, codec, text, seed=seed),
        )  # fmt: skip
    entries = []
    for spec, heads in found.heads.items():
        row, told = find(spec.split("(")[0]), found.told.get(spec, "")
        entries.append(Entry(slug=row.slug, spec=spec, family=row.family, about=row.claim, url=row.url, heads=heads, told=told))
    caption = (
        f"Four heads of {model} on a needle prompt of {LENGTH} tokens: queries run down, keys run across. Dark: attention that is read. "
        "Grey: attention that is missed. Pale blue: read, with little attention there. Settings are those of the quality tables that aim "
        "at a fifth of the pairs (prefill) or a quarter of the cache; what a method really reads here stands below its picture. Of "
        "a cache policy the picture shows what is left when the prompt has ended, in every row; of a decode method what each row's last "
        "query reads. Methods that choose when a prompt has ended, or fetch what they read from a form of their own, are shown by single "
        "steps after the first half of the prompt, or by the prompt itself where they serve it in pieces."
        "\n\n"
        "Methods that store smaller entries read all of them. Above their maps stand two strips, keys and values of each token: a step "
        f"of green for each doubling of a number's bits (full colour: {FULL_BITS}, stored as it is; white: dropped). The map is attention "
        "to the entries as they are read back: black where it is what it was, orange where a key gets more of it and blue where it gets "
        "less (full colour from a factor of 4 on). The strips below show how far each key and value is off, from white to purple for an "
        "error as large as the entry."
    )
    made = f"saccade gallery --out {out.as_posix()}" + (f" --model {model}" if model != "pocket" else "")
    made += f" --methods '{methods}'" if methods else ""
    path = write_gallery(
        sorted(entries, key=lambda entry: (entry.family, entry.slug)), out, caption=caption, command=made, absent=found.failed
    )
    for spec, reason in found.failed.items():
        console(stderr=True).print(f"left out {spec}: {reason}", soft_wrap=True)
    console().print(f"gallery: {path}", soft_wrap=True)
