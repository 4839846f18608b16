"""Loading by name: folders without the network, and one sentence for what can't be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel
from transformers.utils import logging

from saccade.evaluate.loading import load_model
from saccade.models.pocket import path as pocket_path


def test_a_folder_loads_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    shown = logging.is_progress_bar_enabled()
    model, tokenizer = load_model(str(pocket_path()), device="cpu", dtype="bfloat16")
    assert isinstance(model, PreTrainedModel) and not model.training
    assert next(model.parameters()).dtype.itemsize == 2
    assert tokenizer("a")["input_ids"] == [1, 100]
    assert logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("./nothing/here", {}, "there is no folder ./nothing/here"),
        ("someone/some-model", {"offline": True}, "can't be loaded from the local cache"),
        ("pocket", {"dtype": "int8"}, "dtype 'int8' is unknown"),
        ("pocket", {"device": "toaster"}, "device 'toaster' is unknown"),
    ],
)
def test_what_can_not_be_loaded_is_said_in_a_sentence(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be loaded from its folder"):
        load_model(str(tmp_path))
