"""Calibration plans for many methods at once: each made when first needed, on a little text, and used again."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import calibrate
from saccade.core import Calibrated, Method, Plan
from saccade.evaluate.contenders import Contender
from saccade.evaluate.lineups import PLAN_FIELDS, PLANNED
from saccade.evaluate.prompts import Codec, prompt_of
from saccade.evaluate.tasks import build
from saccade.methods.cache.adore import Adore
from saccade.methods.cache.dynamic_llava import DynamicLlava
from saccade.train.gates import Sample, passkeys
from saccade.train.recipes import train_plan
from saccade.train.text import Grammar
from saccade.train.token_controller import train_token_controller
from saccade.train.token_predictors import train_token_predictors

SAMPLES = 2
LONGEST = 4096  # tokens of a sample
TRAINED_STEPS = 60
TRAINED_LENGTH = 1024
FACTS = 4  # in a text
FACT = 160  # bytes of text for each
COPIED = 10**9  # parameters up to which a float32 copy is made


@dataclass
class Plans:
    """Plans of one model. made: by method and the fields it depends on; a reason in place of a plan where it could not be made."""

    model: PreTrainedModel
    codec: Codec
    grammar: Grammar
    seed: int = 0
    made: dict[tuple[Any, ...], Plan | str] = field(default_factory=dict)
    copy: PreTrainedModel | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def of(self, contender: Contender, length: int) -> list[Plan]:
        """The plans that a contender needs, made on texts of `length` tokens at most; ValueError with the reason where one can't be."""
        found = []
        for method in contender.members:
            slug = method.info.slug
            if "calibration" not in method.info.needs and slug not in PLANNED:
                continue
            key = (slug, *(getattr(method, name) for name in PLAN_FIELDS.get(slug, ())))
            if key not in self.made:
                try:
                    self.made[key] = self._make(method, min(length, LONGEST))
                except Exception as error:  # told again for every line that needs it
                    self.made[key] = f"no plan: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            plan = self.made[key]
            if isinstance(plan, str):
                raise ValueError(plan)
            found.append(plan)
        return found

    def _make(self, method: Method, length: int) -> Plan:
        model = self._exact()
        if isinstance(method, Calibrated):
            task = build("text")
            # far from the indices of samples, whose texts these must not be
            places = [1_000_000 + i for i in range(SAMPLES)]
            texts = [prompt_of(task, self.codec, self.grammar, length=length, seed=self.seed, index=i) for i in places]
            return calibrate(model, method, [torch.tensor([text.context]) for text in texts])
        length = min(length, TRAINED_LENGTH)
        if isinstance(method, DynamicLlava):
            return train_token_predictors(model, self._facts(length), steps=TRAINED_STEPS, method=method, seed=self.seed)
        if isinstance(method, Adore):
            return train_token_controller(model, self._facts(length), steps=TRAINED_STEPS, method=method, seed=self.seed)
        return train_plan(
            model, method, self.grammar, self.codec.encode, prefix=self.codec.prefix, length=length, steps=TRAINED_STEPS, seed=self.seed
        )

    def _facts(self, length: int) -> Iterator[Sample]:
        """Texts with facts that are asked for at their end."""
        rng, count = Random(self.seed), max(1, min(FACTS, length // FACT - 1))
        while True:
            yield passkeys(self.grammar, self.codec.encode, rng, prefix=self.codec.prefix, length=length, count=count, words=0)

    def _exact(self) -> PreTrainedModel:
        """The model in float32, in which gradients are taken: a copy where it is a small one of half precision."""
        if self.copy is None:
            small = sum(parameter.numel() for parameter in self.model.parameters()) < COPIED
            half = next(self.model.parameters()).dtype != torch.float32
            self.copy = deepcopy(self.model).float() if half and small else self.model
        return self.copy
