"""What the host does for a call besides launching kernels: microseconds, with kernels that do nothing, so that it runs without a GPU.

    python benchmarks/host.py [RESULT.json]

Every function is timed through its torch.library op and as the plain call that `saccade.ops.routes` makes of it, in turn. Tensors are small
CPU tensors: the host's work does not depend on the length. Hopper's kernels are taken where the shapes allow them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.runtime.jit import KernelInterface

ROUNDS, CALLS = 9, 100
HEADS, N, DIM = 16, 128, 128
launched = 0


def launch(*args: object, **options: object) -> None:
    global launched
    launched += 1


def leaf(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def forms() -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """What is called, and what gradients are taken of."""
    attend, scan, conv = (import_module(f"saccade.ops.{name}") for name in ("attend", "scan", "conv"))
    q, k, v = (leaf(1, HEADS, N, DIM) for _ in range(3))
    x, weight = leaf(1, N, HEADS * DIM), leaf(HEADS * DIM, 4)

    def scanned(**gates: torch.Tensor) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
        leaves = [q, k, v, *(gate for gate in gates.values() if gate.requires_grad)]
        return lambda: scan.scan(q, k, v, impl="triton", **gates)[0], leaves

    return {
        "attend, dense": (lambda: attend.attend(q, k, v, impl="triton").out, [q, k, v]),
        "scan, lightning": scanned(log_decay=torch.full((HEADS,), -0.1)),
        "scan, delta": scanned(beta=leaf(1, HEADS, N)),
        "scan, kda": scanned(beta=leaf(1, HEADS, N), log_decay=leaf(1, HEADS, N, DIM)),
        "short_conv": (lambda: conv.short_conv(x, weight, activation="silu", impl="triton"), [x, weight]),
    }


def timed(call: Callable[[], object]) -> float:
    call()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.perf_counter() - begin) / CALLS


def measured(name: str, call: Callable[[], torch.Tensor], leaves: list[torch.Tensor], routes: ModuleType) -> Iterator[dict[str, object]]:
    """A row for a call without gradients, and one for a call with them and its backward pass."""
    ones, plain = torch.ones_like(call()), routes.unwatched

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), leaves, ones)

    for what, run in (("forward", forward), ("forward and backward", both)):
        times: dict[str, list[float]] = {"op": [], "plain": []}
        for _ in range(ROUNDS):
            for route, unwatched in (("op", lambda *given: False), ("plain", plain)):
                routes.unwatched = unwatched
                times[route].append(timed(run))
        before = launched
        run()
        medians = {f"{route} us": round(statistics.median(taken), 1) for route, taken in times.items()}
        row = {"function": name, "call": what, "kernels": launched - before, **medians}
        print(row, flush=True)
        yield row


def main() -> None:
    torch.set_num_threads(1)
    KernelInterface.__getitem__ = lambda self, grid: launch
    routes, hopper = import_module("saccade.ops.routes"), import_module("saccade.ops.attend.triton.hopper")
    for name in ("attend", "scan", "conv"):
        import_module(f"saccade.ops.{name}").require_triton = lambda op, x: None
    import_module("saccade.ops.attend.triton.launch")._hopper_takes = hopper.takes
    backward = import_module("saccade.ops.attend.triton.hopper_backward")
    import_module("saccade.ops.attend.triton.launch_backward")._hopper_takes = backward.takes
    rows = [row for name, (call, leaves) in forms().items() for row in measured(name, call, leaves, routes)]
    environment = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine(), "threads": 1}
    result = {
        "command": "python benchmarks/host.py", "created": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment,
        "rounds": ROUNDS, "calls": CALLS, "rows": rows,
    }  # fmt: skip
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
