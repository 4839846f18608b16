"""decode in plain torch: the queries of a group become rows over their key/value head, selected keys are gathered."""

from __future__ import annotations

from torch import Tensor

from saccade.core import HeadLayout, Partial, Selection
from saccade.ops.attend import cpu as gathering
from saccade.ops.attend import dense
from saccade.ops.attend.problem import Problem


def rectangle(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, scale: float, softcap: float | None, return_lse: bool
) -> Partial:
    problem = Problem(
        q=q, k=k, v=v, selection=selection, causal=False, scale=scale, softcap=softcap, bias=None, return_lse=return_lse,
        layout=HeadLayout.of(q, k, v),
    )  # fmt: skip
    return dense.attend(problem)[1] if selection is None else gathering.attend(problem)
