"""decode in plain torch: the queries of a group become rows over their key/value head, selected keys are gathered."""

from __future__ import annotations

from dataclasses import replace

from saccade.core import Partial
from saccade.ops.attend import cpu as gathering
from saccade.ops.attend import dense
from saccade.ops.attend.problem import Problem
from saccade.ops.decode import masked, single
from saccade.ops.decode.listed import Ends


def rectangle(problem: Problem) -> Partial:
    """Attention over a rectangular cache, as `problem` says."""
    s = problem.selection
    if s is None:
        return dense.attend(problem)[1]
    if s.n_q != 1:
        return gathering.attend(problem)
    ends = Ends.of(s)
    if single.covers_all(s, ends):
        return dense.attend(replace(problem, selection=None))[1]
    if masked.takes(problem, ends):
        found = masked.attend(problem)
        if found is not None:
            return found
    return single.attend(problem, ends) if single.takes(problem, ends) else gathering.attend(problem)
