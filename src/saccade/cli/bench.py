"""`saccade bench`: kernels against dense attention in the same run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    attend = "attend"
    decode = "decode"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    kind: Annotated[Kind, typer.Argument(help="attend: block-sparse attention over a prompt; decode: one query over a cache.")],
    n: Annotated[int | None, typer.Option("--n", help="Keys; default 8192 for attend, 32768 for decode.", min=256)] = None,
    heads: Annotated[int, typer.Option("--heads", help="Query heads.", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="Key/value heads.", min=1)] = 8,
    dim: Annotated[int, typer.Option("--dim", help="Channels per head.", min=8)] = 64,
    density: Annotated[float, typer.Option("--density", help="attend: share of the visible pairs that is read.", min=1e-4, max=1.0)] = 0.10,
    tile: Annotated[int, typer.Option("--tile", help="attend: tile size on both sides.", min=1)] = 128,
    selected: Annotated[int, typer.Option("--selected", help="decode: tokens read per head.", min=1)] = 1024,
    page: Annotated[int, typer.Option("--page", help="decode: tokens are read in whole pages of this many.", min=1)] = 1,
    dtype: Annotated[DType, typer.Option("--dtype", help="Number format.")] = DType.float32,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    impl: Annotated[str, typer.Option("--impl", help="Implementation: auto, reference, cpu, triton, flex.")] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds; the contestants take turns.", min=1)] = 7,
    check: Annotated[bool, typer.Option("--check", help="Compare with the reference; exit code 1 if it differs.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result to this file as well.")] = None,
) -> None:
    """Time sparse attention against dense attention and print the result as JSON.

    Median, minimum and maximum in ms; the speed-up is the median over rounds of dense time / sparse time.
    """
    import torch

    from saccade.bench.attend import bench_attend
    from saccade.bench.decode import bench_decode
    from saccade.cli.console import write_json
    from saccade.core.files import atomic_write, check_writable

    if json is not None:
        check_writable(json)
    if heads % kv_heads:
        raise ValueError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA GPU that torch can use")
    number = getattr(torch, dtype.value)
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": number, "device": device, "impl": impl, "repeats": repeats}
    if kind is Kind.attend:
        result = bench_attend(n=n or 8192, tile=tile, density=density, check=check, **shape)
    else:
        if selected > (n or 32768):
            raise ValueError(f"--selected {selected} is more than the {n or 32768} keys there are")
        result = bench_decode(n=n or 32768, selected=selected, page=page, check=check, **shape)
    write_json(result)
    if json is not None:
        import json as text

        with atomic_write(json) as temporary:
            temporary.write_text(text.dumps(result, indent=2) + "\n")
    if check and not result["check"]["ok"]:
        raise typer.Exit(1)
