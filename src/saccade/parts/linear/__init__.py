"""Parts of mixers: feature maps, gates, normalisers, short convolutions, write strengths, merges, and the recurrent layer made of them."""

from saccade.parts.linear.bidirectional import bidir_linear
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.features import feature_map
from saccade.parts.linear.partial import gated_sum, mean_of_norms, partial_softmax, shared_denominator
from saccade.parts.linear.quadratic import quadratic
from saccade.parts.linear.recurrent import Recurrent
from saccade.parts.linear.tokens import last_tokens

__all__ = [
    "Recurrent", "ShortConv", "bidir_linear", "feature_map", "gated_sum", "last_tokens", "mean_of_norms", "partial_softmax", "quadratic",
    "shared_denominator",
]  # fmt: skip
