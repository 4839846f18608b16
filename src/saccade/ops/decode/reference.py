"""The oracle for decode: the attend reference."""

from __future__ import annotations

from torch import Tensor

from saccade.core import HeadLayout, Partial, Selection
from saccade.ops.attend import reference
from saccade.ops.attend.problem import Problem


def rectangle(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, scale: float, softcap: float | None, return_lse: bool
) -> Partial:
    problem = Problem(
        q=q, k=k, v=v, selection=selection, causal=False, scale=scale, softcap=softcap, bias=None, return_lse=return_lse,
        layout=HeadLayout.of(q, k, v),
    )  # fmt: skip
    return reference.attend(problem)
