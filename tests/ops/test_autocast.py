"""Operands of several dtypes: under autocast they become one, as in torch's own attention; elsewhere they are refused."""

from __future__ import annotations

import pytest
import torch

from saccade.ops import attend
from saccade.ops.scan import scan, scan_step


def mixed(n: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A norm has made two of them float32."""
    q, k, v = torch.randn(3, 1, 2, n, 16, generator=torch.Generator().manual_seed(0)).unbind()
    return q, k / k.norm(dim=-1, keepdim=True), v.bfloat16()


def test_under_autocast_they_take_its_dtype():
    q, k, v = mixed()
    with torch.autocast("cpu", torch.bfloat16):
        outs, wanted = (
            (scan(*given)[0], attend(*given).out, scan_step(*(x[:, :, 0] for x in given), None)[0])
            for given in ((q, k, v), (q.bfloat16(), k.bfloat16(), v))
        )
    for out, want in zip(outs, wanted, strict=True):
        assert out.dtype == torch.bfloat16 and torch.equal(out, want)


def test_one_dtype_stays_as_it_is():
    q, k, v = mixed()
    with torch.autocast("cpu", torch.bfloat16):
        assert scan(q, k, v.float())[0].dtype == torch.float32


@pytest.mark.parametrize("call", [scan, attend])
def test_elsewhere_they_are_refused(call):
    with pytest.raises(TypeError, match="convert them to one dtype"):
        call(*mixed())
