"""Kernels run in Triton's interpreter where there is no GPU; the choice has to stand before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
