"""decode in plain torch: the queries of a group become rows over their key/value head, selected keys are gathered."""

from __future__ import annotations

from torch import Tensor

from saccade.core import HeadLayout, Partial, Selection
from saccade.ops.attend import cpu as gathering
from saccade.ops.attend import dense
from saccade.ops.attend.problem import Problem
from saccade.ops.decode import single


def rectangle(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, scale: float, softcap: float | None, return_lse: bool
) -> Partial:
    whole = selection is None or (q.shape[2] == 1 and single.covers_all(selection))
    problem = Problem(
        q=q, k=k, v=v, selection=None if whole else selection, causal=False, scale=scale, softcap=softcap, bias=None,
        return_lse=return_lse, layout=HeadLayout.of(q, k, v),
    )  # fmt: skip
    if whole:
        return dense.attend(problem)[1]
    return single.attend(problem) if single.takes(problem) else gathering.attend(problem)
