"""The recipe for lm-evaluation-harness in docs/guide.md, on a tiny local task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import saccade

TASK = """
task: tiny_python
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_an_attached_model_runs_in_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install 'saccade[harness]'")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    filler = "".join(f"def f{i}(x):\n    return x * {i}\n\n" for i in range(40))
    rows = [{"text": f"{filler}def add(a, b):\n    return a", "choices": [" + b", " + zebra"], "label": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    model, tokenizer = saccade.pocket()
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with saccade.attach(model, prefill="minference(columns=64, offsets=64)") as handle:
        found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=["tiny_python"], task_manager=tasks, bootstrap_iters=0)
        density = handle.stats().prefill_density
    assert found is not None and found["results"]["tiny_python"]["acc,none"] == 1
    assert density is not None and density < 0.9
