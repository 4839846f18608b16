"""The worked example of CONTRIBUTING.md runs as it is printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import torch

import saccade
from saccade.core import REGISTRY
from tests.contract.harness import greedy, llama, tokens

ROOT = Path(__file__).parents[1]


def test_the_worked_example_runs() -> None:
    method, test = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    module = ModuleType("worked_example")
    sys.modules["worked_example"] = module
    try:
        exec(compile(method, "CONTRIBUTING.md", "exec"), module.__dict__)
        exec(compile(test, "CONTRIBUTING.md", "exec"), module.__dict__)
        module.test_long_values_survive()
        with saccade.attach(llama(), cache="value-norm(budget=0.5, sinks=1, recent=4)") as handle, torch.no_grad():
            greedy(llama(), tokens(2, 60), 4)
            assert handle.stats().kept == [[33, 33], [33, 33]]
    finally:
        REGISTRY.pop("value-norm", None)
        sys.modules.pop("worked_example")
