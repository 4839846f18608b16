"""The vision transformer: which mixers it takes, that they see the whole image, saving and loading, and that several of them learn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from saccade.core import REGISTRY, Mixer, MixerShape
from saccade.methods import load_all
from saccade.models.vit import SaccadeViTConfig, SaccadeViTForImageClassification, image_mixer
from saccade.models.vit.mixers import FullAttention
from saccade.parts.linear.both_ways import TwoWayMixer

SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "num_channels": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_labels": 2,
}  # fmt: skip
MIXERS = (
    "mala", "inline", "rala", "flatten", "nalaformer", "infsa", "soft", "linformer(k=8)", "efficient-attention", "taylorshift", "latte",
    "hedgehog", "softmax", "mala & softmax",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model(*layers: str, **changed: Any) -> SaccadeViTForImageClassification:
    torch.manual_seed(0)
    config = SaccadeViTConfig(**{**SMALL, "initializer_range": 0.2, **changed, "layers": list(layers)})
    return SaccadeViTForImageClassification(config).eval()


def images(b: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(b, 2, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("spec", MIXERS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_every_token_sees_the_whole_image(spec: str, size: tuple[int, int]):
    made, x = model(spec, image_size=list(size)), images(1, *size)
    out = made(x, output_hidden_states=True)
    n = size[0] * size[1] // 16
    assert out.logits.shape == (1, 2) and [h.shape for h in out.hidden_states] == [(1, n, 32)] * 2
    changed = x.clone()
    changed[:, :, -4:, -4:] += 1.0  # the last patch
    moved = (made.vit(changed).last_hidden_state - made.vit(x).last_hidden_state).abs().amax((0, 2))
    assert moved.min() > 1e-6


@torch.no_grad()
def test_rows_of_a_batch_don_t_meet():
    made, x = model("mala", "softmax"), images()
    together = made(x).logits
    assert (together - torch.cat([made(row[None]).logits for row in x])).abs().max() < 1e-5


def test_what_reads_both_ways_and_what_is_refused():
    assert image_mixer("latte", (4, 4)).info.causality == "bidirectional"
    assert image_mixer("mala", (4, 6)).grid == (4, 6) and image_mixer("mala(grid=(2, 12))", (4, 6)).grid == (2, 12)  # pyright: ignore
    assert image_mixer("inline", (4, 4), token=True).cls  # pyright: ignore[reportAttributeAccessIssue]
    load_all()
    refused = 0
    for slug, kind in REGISTRY.items():
        if not issubclass(kind, Mixer) or slug == "softmax":
            continue
        if issubclass(kind, TwoWayMixer) or kind.info.causality == "bidirectional":
            assert image_mixer(slug, (4, 4)).info.causality == "bidirectional"
        else:
            refused += 1
            with pytest.raises(ValueError, match="is causal and would see a part of the image only"):
                image_mixer(slug, (4, 4))
    assert refused > 20
    for given, said in (
        ({"layers": ["mala", "deltanet"]}, r"layer 1: deltanet is causal"),
        ({"layers": ["softmax(window=4)"]}, "in an image softmax takes no fields"),
        ({"layers": ["mala"], "pool": "token"}, "a class token has no place: use pool='mean'"),
        ({"layers": ["softmax & deltanet"]}, "layer 0: deltanet is causal"),
    ):
        with pytest.raises(ValueError, match=said):
            SaccadeViTForImageClassification(SaccadeViTConfig(**{**SMALL, **given}))


@pytest.mark.parametrize(("given", "said"), [
    ({"patch_size": 5}, "don't fill an image"), ({"pool": "last"}, "is not 'mean' or 'token'"),
    ({"num_attention_heads": 3}, "can't be split"), ({"layers": []}, "layers is empty"),
    ({"num_hidden_layers": 3, "layers": ["mala", "soft"]}, "list one for each layer"),
    ({"image_size": [16, 0]}, "give one positive number of pixels"),
])  # fmt: skip
def test_configs_that_can_t_be(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        SaccadeViTConfig(**{**SMALL, **given})


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"has shape \(1, 2, 8, 8\): expected \(B, 2, 16, 16\)"):
        model("mala")(images(1, 8, 8))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_saved_and_loaded_it_is_the_same(pool: str, tmp_path: Path):
    made = model("inline", "softmax", "efficient-attention", pool=pool)
    assert made.vit.config.grid == (4, 4) and (made.vit.token is None) == (pool == "mean")
    before = made(images(), labels=torch.tensor([0, 1, 0]))
    made.save_pretrained(tmp_path)
    for kind in (SaccadeViTForImageClassification, AutoModelForImageClassification):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is SaccadeViTForImageClassification and loaded.config.specs == ["inline", "softmax", "efficient-attention"]
        assert torch.allclose(loaded(images()).logits, before.logits, atol=1e-6)
    assert before.loss == pytest.approx(float(torch.nn.functional.cross_entropy(before.logits, torch.tensor([0, 1, 0]))))


def test_the_class_token_is_what_the_classifier_reads():
    made = model("softmax", pool="token")
    out = made.vit(images())
    assert out.last_hidden_state.shape == (3, 17, 32) and torch.equal(out.pooler_output, out.last_hidden_state[:, 0])


@torch.no_grad()
def test_full_attention_is_its_definition():
    torch.manual_seed(0)
    layer, x = FullAttention().module(MixerShape(dim=32, heads=2)).double(), torch.randn(2, 9, 32, dtype=torch.float64)
    assert (layer(x)[0] - layer.naive(x)).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("spec", MIXERS)
def test_in_bfloat16_and_under_autocast_it_says_about_the_same(spec: str):
    made, x = model(spec), images()
    exact = made(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = made(x).logits
    half = made.to(torch.bfloat16)(x).logits
    assert half.dtype == torch.bfloat16
    for logits in (cast, half):
        assert (logits.float() - exact).norm() < 0.1 * exact.norm()


def test_checkpointed_gradients_are_the_same():
    made, x, labels = model("mala", "softmax").train(), images(), torch.tensor([0, 1, 1])
    made(x, labels=labels).loss.backward()
    plain = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    assert len(plain) == len(list(made.parameters()))
    made.zero_grad()
    # the old name warns where the new one exists
    getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)({"use_reentrant": False})
    made(x, labels=labels).loss.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(plain, made.parameters(), strict=True) if p.grad is not None)


def pairs_of_spots(b: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two bright patches in noise, each of one of two channels, and whether they are of the same: no patch alone can tell."""
    places = torch.rand(b, 16, generator=generator).topk(2).indices
    channels = torch.randint(2, (b, 2), generator=generator)
    bright = torch.zeros(b, 2, 16)
    for i in range(2):
        bright[torch.arange(b), channels[:, i], places[:, i]] = 2.0
    x = bright.unflatten(-1, (4, 4)).repeat_interleave(4, -1).repeat_interleave(4, -2)
    return x + 0.3 * torch.randn(b, 2, 16, 16, generator=generator), (channels[:, 0] == channels[:, 1]).long()


def learnt(spec: str, blind: bool = False) -> float:
    """The share of new images that two layers get right after fifty steps; blind: what the mixers give is dropped."""
    made = model(spec, spec, initializer_range=0.1).train()
    for name, p in made.named_parameters():
        if blind and "o_proj" in name:
            p.requires_grad_(False).zero_()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        x, labels = pairs_of_spots(32, generator)
        made(x, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    x, labels = pairs_of_spots(256, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return float((made.eval()(x).logits.argmax(-1) == labels).float().mean())


LEARN = [
    "inline", "flatten", "efficient-attention", "softmax",
    *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("mala", "taylorshift", "rala", "nalaformer", "infsa", "latte")),
]  # fmt: skip


@pytest.mark.parametrize("spec", LEARN)
def test_it_learns_what_takes_a_look_at_two_places(spec: str):
    assert learnt(spec) > 0.95


def test_without_its_mixers_it_does_not():
    assert learnt("softmax", blind=True) < 0.85


def test_importing_it_needs_nothing():
    code = "import sys, saccade.models.vit; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_auto_classes_know_it_after_import_saccade(tmp_path: Path) -> None:
    model("mala").save_pretrained(tmp_path)
    code = (
        "import saccade; from transformers import AutoConfig, AutoModel, AutoModelForImageClassification as Auto; "
        f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__, type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["SaccadeViTForImageClassification", "SaccadeViTModel"], done.stderr
