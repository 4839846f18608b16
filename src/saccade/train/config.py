"""What decides a training run: the phases, the model's shape, the optimizer's rates; and two presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training: until `until` (a share of the whole run), `tokens` a step in sequences of `context`.

    `mix` and `letters` go to the `TaskMix`.
    """

    until: float
    context: int
    tokens: int
    mix: tuple[float, ...]
    letters: tuple[int, ...] = (4,)


POCKET_PHASES = (
    Phase(until=0.40, context=1024, tokens=131_072, mix=(0.19, 0.09, 0.14, 0.05, 0.53), letters=(1, 4, 4)),
    Phase(until=0.58, context=4096, tokens=262_144, mix=(0.24, 0.12, 0.19, 0.06, 0.39), letters=(1, 4, 4)),
    Phase(until=0.76, context=16384, tokens=262_144, mix=(0.27, 0.14, 0.23, 0.08, 0.28)),
    Phase(until=1.00, context=32768, tokens=262_144, mix=(0.28, 0.16, 0.26, 0.08, 0.22)),
)
CHAIN_PHASES = (
    Phase(until=0.66, context=1024, tokens=131_072, mix=(0.06, 0.03, 0.05, 0.02, 0.84)),
    Phase(until=1.00, context=16384, tokens=262_144, mix=(0.22, 0.12, 0.20, 0.06, 0.40)),
)
LENGTH_PHASES = (Phase(until=1.00, context=32768, tokens=262_144, mix=(0.18, 0.18, 0.30, 0.06, 0.28)),)
FINISH_PHASES = (
    Phase(until=0.42, context=2048, tokens=131_072, mix=(0.10, 0.04, 0.06, 0.02, 0.78)),
    Phase(until=0.68, context=8192, tokens=262_144, mix=(0.16, 0.10, 0.16, 0.06, 0.52)),
    Phase(until=1.00, context=32768, tokens=262_144, mix=(0.14, 0.14, 0.22, 0.06, 0.44)),
)
TINY_PHASES = (
    Phase(until=0.5, context=128, tokens=512, mix=(0.4, 0.2, 0.2, 0.0, 0.2)),
    Phase(until=1.0, context=256, tokens=512, mix=(0.4, 0.2, 0.2, 0.0, 0.2)),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. Give `seconds` or `steps`, the length of the run, not both."""

    out: Path
    start: Path | None = None  # a folder with weights to go on from; None: untrained ones
    phases: tuple[Phase, ...] = POCKET_PHASES
    seconds: float | None = None
    steps: int | None = None
    stop_after: int | None = None  # leave after this many steps, with a checkpoint, as if the run was cut off
    hidden: int = 384
    mlp: int = 1024
    layers: int = 8
    query_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rate: float = 3e-3
    warmup_steps: int = 100
    decay_from: float = 0.60
    final_rate: float = 0.03  # as a share of `rate`
    weight_decay: float = 0.1
    clip: float = 1.0
    exam_share: float = 0.2
    split_share: float = 0.2
    seed: int = 0
    corpus_megabytes: float = 250.0
    corpus_roots: tuple[Path, ...] | None = None
    workers: int = 14
    checkpoint_every: int = 400
    log_every: int = 25
    device: str | None = None
    compile: bool = False
    cudnn: bool = False  # attention by cuDNN alone: on an H200 1.5 times the speed of the other kernels

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"seconds {self.seconds} and steps {self.steps} were given, expected exactly one of them")
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(ends) or ends[-1] != 1.0:
            raise ValueError(f"the phases end at {ends}, expected rising shares of the run, the last one 1.0")
        for phase in self.phases:
            if phase.tokens % phase.context:
                raise ValueError(f"{phase.tokens} tokens a step are not a multiple of the context {phase.context}")


def pocket_config(out: str | Path, seconds: float = 282.0) -> TrainConfig:
    """The first of the four runs behind the shipped model: 282 seconds on two H200."""
    return TrainConfig(out=Path(out), seconds=seconds, compile=True, cudnn=True)


def chains_config(out: str | Path, start: Path, seconds: float = 185.0) -> TrainConfig:
    """The second run, from the weights of the first: mostly chains of variables, which the first follows over one hop only."""
    return TrainConfig(
        out=Path(out), start=start, seconds=seconds, phases=CHAIN_PHASES, rate=2e-3, warmup_steps=60, decay_from=0.45, seed=5,
        compile=True, cudnn=True,
    )  # fmt: skip


def length_config(out: str | Path, start: Path, seconds: float = 48.0) -> TrainConfig:
    """The third run, from the weights of the second: 32K contexts again, which the second forgets."""
    return TrainConfig(
        out=Path(out), start=start, seconds=seconds, phases=LENGTH_PHASES, rate=1.5e-3, warmup_steps=15, decay_from=0.35, seed=9,
        corpus_megabytes=60.0, compile=True, cudnn=True,
    )  # fmt: skip


def finish_config(out: str | Path, start: Path, seconds: float = 175.0) -> TrainConfig:
    """The fourth run, from the weights of the third: chains at rising lengths, so that they are followed at 32K too."""
    return TrainConfig(
        out=Path(out), start=start, seconds=seconds, phases=FINISH_PHASES, rate=1.6e-3, warmup_steps=30, decay_from=0.5, seed=33,
        corpus_megabytes=120.0, compile=True, cudnn=True,
    )  # fmt: skip


def tiny_config(out: str | Path, steps: int = 16) -> TrainConfig:
    """A model of 0.1 M parameters that trains on a CPU in seconds: to try the recipe, not to use."""
    return TrainConfig(
        out=Path(out),
        phases=TINY_PHASES,
        steps=steps,
        hidden=64,
        mlp=128,
        layers=2,
        query_heads=2,
        kv_heads=1,
        head_dim=32,
        warmup_steps=4,
        corpus_megabytes=1.0,
        workers=0,
        checkpoint_every=1_000_000,
        log_every=1,
        device="cpu",
    )
