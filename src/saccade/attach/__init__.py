"""Putting methods on transformers models: `saccade.attach`, and the door for bare tensors, `saccade.attention`."""

from saccade.attach.calibration import calibrate
from saccade.attach.capture import Captured, capture
from saccade.attach.doors import attach, attention, memory
from saccade.attach.saving import load_cache
from saccade.attach.session import Session
from saccade.attach.speculate import Speculated, speculate
from saccade.attach.stats import Stats

__all__ = [
    "Captured", "Session", "Speculated", "Stats", "attach", "attention", "calibrate", "capture", "load_cache", "memory", "speculate",
]  # fmt: skip
