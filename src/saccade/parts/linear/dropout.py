"""Dropout on features: the linear methods' place for what softmax attention does to its weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from saccade.parts.linear.features import FeatureMap


class FeatureDropout(FeatureMap):
    """In training, each feature is 0 with this probability, the others are scaled up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"dropout={probability}: give a probability from 0 to below 1")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.probability, self.training)
