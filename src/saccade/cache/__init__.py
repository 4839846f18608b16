"""KVLayer: the one cache layer, and the segments it is made of."""

from saccade.cache.layer import KVLayer
from saccade.cache.segment import PackedSegment, Rectangle, Segment
from saccade.cache.slots import Slots
from saccade.cache.state import CallFacts

__all__ = ["CallFacts", "KVLayer", "PackedSegment", "Rectangle", "Segment", "Slots"]
