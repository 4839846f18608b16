"""A plan's tensors on the device of a step."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from saccade.parts import placed as module
from saccade.parts.placed import placed


def test_columns_device_and_dtype() -> None:
    x = torch.randn(2, 5, 6)
    got = placed(x, torch.device("cpu"), torch.float64, 4)
    assert got.dtype == torch.float64 and torch.equal(got, x[..., :4].double())
    assert torch.equal(placed(x, torch.device("cpu"), columns=99), x) and placed(x, torch.device("meta")).device.type == "meta"


def test_what_lies_there_already_is_not_copied() -> None:
    x = torch.randn(2, 6)
    assert placed(x, torch.device("cpu"), columns=3).data_ptr() == x.data_ptr()


def test_a_copy_is_made_once_for_each_form_and_goes_with_its_tensor() -> None:
    x, other = torch.randn(2, 6), torch.randn(2, 6)
    forms = [(torch.float64, 4), (torch.float64, 5), (torch.bfloat16, 4)]
    with torch.inference_mode():
        first = [placed(x, torch.device("cpu"), *form) for form in forms]
    assert not first[0].is_inference() and [(copy.dtype, copy.shape[-1]) for copy in first] == forms
    assert all(placed(x, torch.device("cpu"), *form) is copy for form, copy in zip(forms, first, strict=True))
    assert not torch.equal(placed(other, torch.device("cpu"), *forms[0]), first[0])
    held, kept = weakref.ref(first[0]), len(module._held)
    del x, first
    gc.collect()
    assert held() is None and len(module._held) == kept - 1


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_the_second_time() -> None:
    x = torch.randn(8, 64)
    copy = placed(x, torch.device("cuda", 0), columns=8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert placed(x, torch.device("cuda", 0), columns=8) is copy
    finally:
        torch.cuda.set_sync_debug_mode("default")
