"""Static patterns: keys chosen by position alone, in one dimension or on a grid."""

from saccade.parts.static.compiled import Compiled, compile_pattern
from saccade.parts.static.keepset import CachePlan
from saccade.parts.static.pattern import Pattern, group, head_offsets, pow2, since, sink, stride, window

__all__ = ["CachePlan", "Compiled", "Pattern", "compile_pattern", "group", "head_offsets", "pow2", "since", "sink", "stride", "window"]
