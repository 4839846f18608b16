"""Training adore's controller: the model is frozen, the controller learns which past tokens each query looks at.

    a_tj = mean of attention over layers and heads,    y_tj = 1 where a_tj is among the K largest of query t, else 0
    loss = mean of binary cross-entropy of sigma_tj and y_tj        over queries t and tokens j that are not among the newest of t

K is what the cache has room for beside its newest tokens, which are kept in any case and are never judged.

On the pocket model (120 steps, texts of about 600 bytes with four facts, K 96) the controller's K hold 0.62 of the K most looked at, the
newest K 0.53, and those with the most attention so far 0.23. That does not yet answer a late question for one of the four, for which a
fact has to come back whole.

Source: adore, arXiv 2407.02328 (about 1000 samples a task; there the model is tuned as well, by low-rank adapters, with attention to its
K largest entries only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.capture import reading_session
from saccade.attach.models import managed_layers
from saccade.core import LayerContext, Plan, fingerprint, over_groups
from saccade.methods import build
from saccade.methods.cache.adore import Adore
from saccade.parts.token_controller import TokenController
from saccade.train.gates import Sample, next_sample


def train_token_controller(
    model: PreTrainedModel, samples: Iterable[Sample], *, steps: int, method: str | Adore = "adore", rate: float = 3e-3, dim: int = 64,
    hidden: int = 64, queries: int = 32, seed: int = 0, progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """Train a controller for a frozen model and return the plan that `adore` needs.

    samples: at least `steps`, one a step: token ids `(B, N)` and a bool mask of the positions that predict an answer; these are learned
    from, and `queries` others, drawn anew each step. method: its size and recent say what a query may look at. rate: of Adam, falling to
    0 over the second half. dim, hidden: of the controller. progress: gets {"step", "loss", "recall"} after every step, recall being the
    share of the K largest that the controller's own K largest hold. ValueError where samples end too soon, one is no longer than the
    newest tokens, or a layer of the model can't be attached.
    """
    chosen = build(method)
    if not isinstance(chosen, Adore):
        raise ValueError(f"train_token_controller makes plans for adore, not for {chosen.info.slug}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train_token_controller got steps={steps!r}: give a whole number of at least 1")
    if chosen.size <= chosen.recent:
        raise ValueError(f"{chosen.spec} keeps its newest tokens alone, which no controller chooses: give a size above recent")
    if len(managed_layers(model)) != int(model.config.get_text_config(decoder=True).num_hidden_layers):
        raise ValueError(f"{type(model).__name__} has layers without full attention, whose attention can't be read: train a model without")
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    controller = new_controller(model, dim=dim, hidden=hidden, seed=seed).to(device)
    optimizer = torch.optim.Adam(controller.parameters(), lr=rate)
    supply, count = iter(samples), chosen.size - chosen.recent
    for step in range(steps):
        ids, answers = (x.to(device) for x in next_sample(supply, step, steps))
        if ids.shape[1] <= chosen.recent:
            raise ValueError(f"sample {step} has {ids.shape[1]} tokens, of which adore always keeps {chosen.recent}: give longer ones")
        rows = query_places(answers, chosen.recent, queries, generator)
        looked = attention_means(model, ids, rows)
        judged = torch.arange(ids.shape[1], device=device) <= (rows - chosen.recent).unsqueeze(1)
        target = among_largest(looked, judged, count)
        with torch.enable_grad():
            states = controller.read(model.get_input_embeddings()(ids).detach())
            logits = controller.importance(states, states[:, rows])
            loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")[:, judged].mean()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            found = among_largest(logits.detach(), judged, count)
            progress({"step": step, "loss": float(loss.detach()), "recall": float((found & target).sum() / target.sum())})
    return controller_plan(model, chosen, controller, {"steps": steps, "rate": rate, "queries": queries, "seed": seed})


def new_controller(model: PreTrainedModel, *, dim: int = 64, hidden: int = 64, seed: int = 0) -> TokenController:
    """An untrained controller for a model's embeddings."""
    table: Any = model.get_input_embeddings()
    width = int(table.weight.shape[1])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TokenController(width, dim, hidden)


def controller_plan(model: PreTrainedModel, method: Adore, controller: TokenController, notes: dict[str, Any] | None = None) -> Plan:
    """The plan of a controller."""
    tensors = {f"layer.0.{name}": x.detach().cpu() for name, x in controller.state_dict().items()}
    facts = {"model": getattr(model.config, "name_or_path", "") or type(model).__name__, **(notes or {})}
    return Plan(slug=method.info.slug, spec=method.spec, fingerprint=fingerprint(model), tensors=tensors, notes=facts)


def query_places(answers: Tensor, recent: int, others: int, generator: torch.Generator) -> Tensor:
    """The places `(T,)` int64 ascending of the queries that are learned from: answers of any row `(B, N)` and `others` drawn ones, none
    of them so early that all its tokens are among its `recent` newest."""
    n = answers.shape[1]
    drawn = torch.randint(recent, n, (others,), generator=generator).to(answers.device)
    told = answers.any(0).nonzero().flatten()
    return torch.cat([drawn, told[told >= recent]]).unique()


@torch.no_grad()
def attention_means(model: PreTrainedModel, ids: Tensor, rows: Tensor) -> Tensor:
    """Attention of the queries at `rows (T,)` to all tokens of ids `(B, N)`, the mean over layers and heads: `(B, T, N)` float32."""
    total = torch.zeros(ids.shape[0], len(rows), ids.shape[1], device=ids.device)
    later = torch.arange(ids.shape[1], device=ids.device) > rows.unsqueeze(1)

    def add(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        logits = over_groups(q[:, :, rows].float().unflatten(1, (k.shape[1], -1)), k.float().mT).flatten(1, 2) * ctx.scale
        if ctx.softcap is not None:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        total.add_(logits.masked_fill(later, -torch.inf).softmax(-1).mean(1) / ctx.layers)

    with reading_session(model, add):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return total


def among_largest(x: Tensor, judged: Tensor, count: int) -> Tensor:
    """Which of x `(B, T, N)` are among the `count` largest of those judged, bool `(T, N)`, in each row; ties to the lower place."""
    order = torch.sort(x.masked_fill(~judged, -torch.inf), dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True) & judged
