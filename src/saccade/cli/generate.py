"""`saccade generate`: text from a model with methods attached, and what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def command(
    prompt_file: Annotated[Path, typer.Option(help="A UTF-8 text file with the prompt; - reads it from stdin.")],
    model: Annotated[
        str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")
    ] = "pocket",
    prefill: Annotated[str | None, typer.Option(help="A prefill method, such as minference.")] = None,
    decode: Annotated[str | None, typer.Option(help="A decode method, such as 'quest(budget=0.1)'.")] = None,
    cache: Annotated[str | None, typer.Option(help="A cache policy, such as 'snapkv(budget=0.25)'.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    plan: Annotated[list[Path] | None, typer.Option(help="A calibration plan; may be given more than once.")] = None,
    graph: Annotated[
        int | None, typer.Option(help="On a GPU: record steps as a CUDA graph, one recording for so many tokens, such as 128.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Write on from a prompt, greedily, with methods attached; what ran is told on stderr."""
    from saccade.cli.console import console
    from saccade.core import Plan
    from saccade.methods import build

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} asks for nothing: give at least 1")
    text = _read(prompt_file)
    methods = {"prefill": prefill, "decode": decode, "cache": cache}
    for phase, spec in methods.items():
        if spec is not None and spec != "dense":
            found = build(spec).info.phase
            if found != phase:
                raise ValueError(f"{spec} is a {found} method: give it as --{found}")
    plans = [Plan.load(path) for path in plan or []]

    import torch

    from saccade.attach import attach
    from saccade.evaluate.loading import load_model

    loaded, tokenizer = load_model(model, device=device, dtype=dtype, offline=offline)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    streamer = _clocked_streamer(tokenizer)
    with attach(loaded, **methods, plan=plans, graph=graph) as handle, torch.no_grad():  # pyright: ignore[reportArgumentType]
        write: Any = loaded.generate
        write(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        stats = handle.stats()
    table = _table(stats, streamer, inputs["input_ids"].shape[1])
    if handle.steps is not None:
        told = f"{handle.steps.replayed:,} replayed, {handle.steps.recorded:,} recorded, {handle.steps.plain:,} plain"
        table.add_row("steps of CUDA graphs", told, "")
    console(stderr=True).print(table)


def _read(path: Path) -> str:
    """The prompt. Raises ValueError when there is none."""
    if str(path) == "-":
        text = sys.stdin.read()
    elif not path.is_file():
        raise ValueError(f"there is no prompt file {path}: give a text file, or - to read from stdin")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise ValueError("the prompt is empty: write some text for the model to go on from")
    return text


def _clocked_streamer(tokenizer: Any) -> Any:
    """A TextStreamer on stdout that remembers when each token came; `ticks[0]` is when the run began."""
    import time

    from transformers import TextStreamer

    class Clocked(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.ticks: list[float] = []

        def put(self, value: Any) -> None:
            # the first value is the prompt, before anything has run
            self.ticks.append(time.perf_counter())
            super().put(value)

    return Clocked()


def _table(stats: Any, streamer: Any, prompt: int) -> Table:
    from rich.table import Table

    from saccade.cli.compare import size

    ticks = streamer.ticks
    first = ticks[1] - ticks[0] if len(ticks) > 1 else None
    steps = len(ticks) - 2
    held = [n for layer in stats.kept for n in layer]
    grid = Table(box=None, show_header=False, pad_edge=False)
    rows = [
        ("prompt", f"{prompt:,} tokens", "" if first is None else f"first token after {first * 1e3:.0f} ms"),
        (
            "written",
            f"{max(0, len(ticks) - 1):,} tokens",
            f"{steps / (ticks[-1] - ticks[1]):.1f} tokens/s" if steps > 0 else "",
        ),
        ("pairs read in prefill", _share(stats.prefill_density), "of those that dense attention reads"),
        ("pairs read in decoding", _share(stats.decode_density), "of those that dense attention reads"),
        (
            "entries held",
            f"{sum(held) / len(held):,.0f}" if held else "-",
            f"of {stats.tokens_seen:,} tokens seen, mean over layers and heads",
        ),
        ("keys and values", size(stats.kv_bytes), ""),
        ("positions, scores, indices", size(stats.index_bytes), ""),
    ]
    for row in rows:
        grid.add_row(*row)
    return grid


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
