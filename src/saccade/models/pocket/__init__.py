"""The pocket model: a byte-level Llama of 12.7 M parameters, trained for retrieval over 32K positions, in the package.

It lets quality be measured anywhere, with no download: it has real induction and retrieval heads. How it was trained
and what it scores: MODEL_CARD.md and report.json in this folder; the recipe is `saccade.train.pocket`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging


def path() -> Path:
    """The folder of the weights, the configuration and the tokenizer; any `from_pretrained` can load it."""
    return Path(__file__).resolve().parent


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars over 25 MB."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pocket(
    dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the pocket model, in eval mode, and its tokenizer, from the package: no network.

    `device` defaults to the GPU if there is one, else the CPU; `dtype` to bfloat16 on a GPU and float32 on a CPU.
    The model has 8 layers, 6 query and 2 key/value heads of 64 dims, and 32768 positions. Raises ValueError for a
    dtype that is not a floating-point one, and for a device that this machine lacks.
    """
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(place)!r} was asked for, but torch sees no GPU here; pass device='cpu'")
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, expected a floating-point torch dtype such as torch.bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(path(), local_files_only=True)
    with quiet():
        model = LlamaForCausalLM.from_pretrained(path(), dtype=dtype, local_files_only=True)
    model.to(place)  # type: ignore[arg-type]
    return model.eval(), tokenizer
