"""Loading a model and its tokenizer by name, and saying in one sentence why not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, *, device: str | None = None, dtype: str | None = None, offline: bool = False) -> tuple[PreTrainedModel, Any]:
    """`(model, tokenizer)`, in eval mode on `device` (default: the GPU if there is one).

    name: "pocket", a folder, or a model of the Hugging Face hub. Only a hub name touches the network, and with
    `offline`
    not even that: it is then looked up in the local cache. dtype: "float32", "bfloat16" or "float16"; default: the
    model's own, for pocket bfloat16 on a GPU and float32 on a CPU. Raises ValueError, in one sentence, when that fails.
    """
    place = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    if name == "pocket":
        from saccade.models.pocket import pocket

        with _quiet():
            return pocket(dtype=None if dtype is None else DTYPES[dtype], device=place)
    path = Path(name).expanduser()
    local = path.exists()
    if local and not (path / "config.json").is_file():
        raise ValueError(f"{name} holds no model: it has no config.json; give the folder that `save_pretrained` wrote")
    if not local and _looks_like_a_path(name):
        raise ValueError(f"there is no folder {name}: give a folder with a saved model, a hub name, or pocket")
    source = str(path) if local else name
    options: dict[str, Any] = {"local_files_only": local or offline}
    try:
        with _quiet() if local or offline else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if dtype is None else DTYPES[dtype], **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "from its folder" if local else "from the local cache" if offline else "from the hub"
        advice = "check the folder" if local else "check the name and the network, or give the folder of a saved model"
        raise ValueError(f"the model {name!r} can't be loaded {where} ({_first_sentence(error)}): {advice}") from None
    model.to(place)  # pyright: ignore[reportArgumentType]
    return model.eval(), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers: reading files from the disk takes a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown: use cpu, cuda or cuda:N") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU here: use --device cpu")
    if place.type == "cuda" and place.index is not None and place.index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} GPUs: use a lower number")
    return place


def _looks_like_a_path(name: str) -> bool:
    # hub names are NAME or OWNER/NAME
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".:")[:200]
