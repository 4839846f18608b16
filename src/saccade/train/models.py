"""The model that a recipe describes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from saccade.models.pocket import path as pocket_path
from saccade.models.pocket import quiet
from saccade.train.fields import nearest


def build_model(description: str | Mapping[str, Any], vocabulary: int | None = None, seed: int = 0) -> PreTrainedModel:
    """A causal model in float32 on the CPU.

    description: "pocket"; a folder that transformers can load; or arguments of a new model, whose weights follow from `seed`:
    those of `saccade.models.decoder.SaccadeConfig` (`layers`, `hidden_size`, ...), or `architecture`, a model type of transformers such
    as "llama", and the arguments of its configuration. vocabulary: token ids that the data uses; a new model gets that many unless told
    otherwise. Raises ValueError or TypeError, in one sentence, for what can't be built and for a vocabulary that is too small.
    """
    if isinstance(description, str):
        model = _load(description)
    elif isinstance(description, Mapping):
        torch.manual_seed(seed)
        model = _new(dict(description), vocabulary)
    else:
        raise TypeError(f"model is {description!r}, expected 'pocket', a folder, or the arguments of a new model")
    held = model.config.get_text_config().vocab_size
    if vocabulary is not None and held < vocabulary:
        raise ValueError(f"the data uses {vocabulary} token ids, but the model knows {held}: give it a larger vocabulary, or other data")
    return model.float()


def _load(name: str) -> PreTrainedModel:
    folder = pocket_path() if name == "pocket" else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"model is {name!r}, which is no folder with a config.json: give 'pocket', a model's folder, or its arguments")
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def _new(given: dict[str, Any], vocabulary: int | None) -> PreTrainedModel:
    architecture = given.pop("architecture", None)
    if architecture is None:
        return _decoder(given, vocabulary)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if architecture not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"model.architecture is {architecture!r}, which transformers does not know: "
                         f"{nearest(str(architecture), [str(name) for name in CONFIG_MAPPING_NAMES])}")  # fmt: skip
    kind = CONFIG_MAPPING[architecture]
    config = _config(kind, given, vocabulary)
    try:
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"model can't be built as {architecture}: {_one_line(error)}") from None


def _decoder(given: dict[str, Any], vocabulary: int | None) -> PreTrainedModel:
    from saccade.models.decoder import SaccadeConfig, SaccadeForCausalLM

    if "layers" not in given:
        raise ValueError("model names neither layers nor an architecture: give layers: [mixer specs], or architecture: llama")
    config = _config(SaccadeConfig, given, vocabulary)
    try:
        return SaccadeForCausalLM(config)
    except (ValueError, TypeError) as error:
        raise type(error)(f"model: {_one_line(error)}") from None


def _config(kind: type[PretrainedConfig], given: dict[str, Any], vocabulary: int | None) -> Any:
    given = given if vocabulary is None else {"vocab_size": vocabulary, **given}
    known = [name for name, p in inspect.signature(kind).parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in given:
        if name not in known:
            raise ValueError(f"model has no argument {name!r} ({kind.__name__}): {nearest(str(name), known)}")
    try:
        return kind(**given)
    except Exception as error:  # configurations check their fields with errors of their own kinds
        cause = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
        raise ValueError(f"model can't be configured as {kind.__name__}: {_one_line(cause)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
