"""The offline part of a method that looks at the gradient of a loss and decides over all layers together."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from saccade.core import Calibrated, LayerContext


class GradientCalibrated(Calibrated):
    """Statistics per layer from one dense forward and backward pass, summed over samples, and one conclusion for all layers."""

    @abstractmethod
    def measure_gradient(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Tensor]:
        """Statistics of one layer on one sample; d_out `(B, Hq, N, Dv)` is the gradient of the loss to the attention output."""

    @abstractmethod
    def loss_tokens(self, n: int) -> int:
        """Of a sample of n tokens, how many at its end the loss is taken on."""

    @abstractmethod
    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The plan's tensors for each layer from the summed statistics of all layers."""

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        # samples of different lengths have statistics of different names
        return {**sums, **super().combine({name: sums[name] for name in found if name in sums}, found)}

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        raise ValueError(f"{self.info.slug} measures gradients: run it through saccade.calibrate, which gives them")

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.conclude_all({0: sums})[0]
