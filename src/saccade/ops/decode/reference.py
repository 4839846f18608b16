"""The oracle for decode: the attend reference."""

from __future__ import annotations

from saccade.core import Partial
from saccade.ops.attend import reference
from saccade.ops.attend.problem import Problem


def rectangle(problem: Problem) -> Partial:
    """Attention over a rectangular cache, as `problem` says."""
    return reference.attend(problem)
