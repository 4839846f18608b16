"""The arithmetic: softmax attention over selections, in a reference form and fast ones."""

from saccade.ops.attend import ExtraKeys, attend
from saccade.ops.decode import decode
from saccade.ops.record import LastRun, last_run

__all__ = ["ExtraKeys", "LastRun", "attend", "decode", "last_run"]
