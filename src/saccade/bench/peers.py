"""Dense attention by others: torch's kernels one by one, and the libraries that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.bench.case import Contestant, Run, Skip, Work

LIBRARIES = {"flash_attn": "flash-attn", "sageattention": "sageattention", "fla": "flash-linear-attention"}
KERNELS = {
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    "FlashAttention-2": [SDPBackend.FLASH_ATTENTION],
    "SDPA": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}


@dataclass(frozen=True)
class Inputs:
    """q `(B, Hq, N, D)`, k and v `(B, Hk, Nk, D)`; d_out: the gradient of the output, where the backward pass is timed too."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = True
    d_out: Tensor | None = None

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]


def library(name: str) -> tuple[Any, str]:
    """(module, "") or (None, why not). A library that is installed and breaks at import is absent as well."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"{name} does not import: {error}"
        return None, f"{name} is not installed: pip install {LIBRARIES[name]}"
    except Exception as error:  # compiled parts that don't fit this torch raise anything
        return None, f"{name} does not import: {' '.join(str(error).split())[:160]}"


def installed() -> dict[str, str]:
    """Version of each library, or why it is absent."""
    found = {}
    for name, package in LIBRARIES.items():
        module, why = library(name)
        try:
            found[name] = why or version(package)
        except PackageNotFoundError:
            found[name] = str(getattr(module, "__version__", "unknown version"))
    return found


def backward_of(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], d_out: Tensor | None) -> Callable[[], Any]:
    """The call alone, or with its gradients: (out, gradient of each leaf)."""
    if d_out is None:
        return call

    def both() -> tuple[Tensor, ...]:
        out = call()
        return (out.detach(), *torch.autograd.grad(out, leaves, d_out))

    return both


def outputs_of(d_out: Tensor | None) -> Callable[[Any], tuple[Tensor, ...]]:
    return (lambda raw: (raw,)) if d_out is None else (lambda raw: raw)


def dense(x: Inputs, work: Work, *, checked: bool = True, role: str = "dense") -> list[Contestant]:
    """torch's fused kernels, one by one, and the dense libraries that are there. On a CPU torch's own choice."""
    if not x.q.is_cuda:
        return [Contestant(name="SDPA", role="dense", work=work, make=lambda: _torch(x, None), checked=checked)]
    found = [
        Contestant(name=name, role="dense", work=work, make=lambda kernels=kernels: _torch(x, kernels), checked=checked)
        for name, kernels in KERNELS.items()
    ]
    if library("flash_attn")[0] is not None:
        found.append(Contestant(name="flash-attn", role="dense", work=work, make=lambda: _flash(x), checked=checked))
    if library("sageattention")[0] is not None and x.d_out is None and x.q.shape[2] == x.k.shape[2]:
        found.append(Contestant(name="SageAttention", role="peer", work=work, make=lambda: _sage(x), checked=checked))
    return found


def _torch(x: Inputs, kernels: list[SDPBackend] | None) -> Run:
    def call(k: Tensor, v: Tensor, grouped: bool) -> Tensor:
        if kernels is None:
            return F.scaled_dot_product_attention(x.q, k, v, is_causal=x.causal, enable_gqa=grouped)
        with sdpa_kernel(kernels):
            return F.scaled_dot_product_attention(x.q, k, v, is_causal=x.causal, enable_gqa=grouped)

    own = backward_of(lambda: call(x.k, x.v, x.grouped), (x.q, x.k, x.v), x.d_out)
    if not x.grouped or kernels is None:
        return Run(call=own, outputs=outputs_of(x.d_out), impl="sdpa")
    try:
        own()
        return Run(call=own, outputs=outputs_of(x.d_out), impl="sdpa")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass
    # a kernel without grouped heads gets its keys and values repeated beforehand, which is not timed
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (y.detach().repeat_interleave(group, 1).requires_grad_(y.requires_grad) for y in (x.k, x.v))

    def outputs(raw: Any) -> tuple[Tensor, ...]:
        if x.d_out is None:
            return (raw,)
        out, dq, dk, dv = raw
        return out, dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)

    wide = backward_of(lambda: call(k, v, False), (x.q, k, v), x.d_out)
    return Run(call=wide, outputs=outputs, impl="sdpa", note="keys and values repeated for it beforehand")


def _flash(x: Inputs) -> Run:
    module, why = library("flash_attn")
    if module is None:
        raise Skip(why)
    q, k, v = (y.detach().transpose(1, 2).contiguous().requires_grad_(y.requires_grad) for y in (x.q, x.k, x.v))
    d_out = None if x.d_out is None else x.d_out.transpose(1, 2).contiguous()
    call = backward_of(lambda: module.flash_attn_func(q, k, v, causal=x.causal), (q, k, v), d_out)

    def outputs(raw: Any) -> tuple[Tensor, ...]:
        return tuple(y.transpose(1, 2) for y in (raw if d_out is not None else (raw,)))

    return Run(call=call, outputs=outputs, impl="flash_attn")


def _sage(x: Inputs) -> Run:
    module, why = library("sageattention")
    if module is None:
        raise Skip(why)
    q, k, v = (y.detach() for y in (x.q, x.k, x.v))
    return Run(call=lambda: module.sageattn(q, k, v, tensor_layout="HND", is_causal=x.causal), impl="sageattention", note="int8 products")
