"""The vocabulary: what is read (Selection), what comes back (Partial), how much (Budget), and what a method is."""

from saccade.core.budget import Budget, Mass, Threshold
from saccade.core.context import EncodedEntries, LayerContext, Phase
from saccade.core.keymajor import KeyMajor
from saccade.core.layout import HeadLayout, check_attention_inputs, over_groups
from saccade.core.method import (
    REGISTRY,
    CachePolicy,
    Calibrated,
    Decode,
    Info,
    Method,
    Prefill,
    PromptReduction,
    Rebuilding,
    StoredKV,
    register,
)
from saccade.core.mixer import Alignment, Call, Mixer, MixerShape, MixerState, TokenMixer
from saccade.core.partial import Partial, merge
from saccade.core.plan import Plan, fingerprint
from saccade.core.rotary import Rotary, rotate
from saccade.core.selection import Selection
from saccade.core.spec import format_spec, parse_spec, split_top_level

__all__ = [
    "REGISTRY",
    "Alignment",
    "Budget",
    "CachePolicy",
    "Calibrated",
    "Call",
    "Decode",
    "EncodedEntries",
    "HeadLayout",
    "Info",
    "KeyMajor",
    "LayerContext",
    "Mass",
    "Method",
    "Mixer",
    "MixerShape",
    "MixerState",
    "Partial",
    "Phase",
    "Plan",
    "Prefill",
    "PromptReduction",
    "Rebuilding",
    "Rotary",
    "Selection",
    "StoredKV",
    "Threshold",
    "TokenMixer",
    "check_attention_inputs",
    "fingerprint",
    "format_spec",
    "merge",
    "over_groups",
    "parse_spec",
    "register",
    "rotate",
    "split_top_level",
]
