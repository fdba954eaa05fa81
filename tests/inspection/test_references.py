"""References by name: an adapter on disk, PEFT's configuration, words; and what kohya's files say of their training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rankaware_optim import (
    InspectionError,
    InvalidReferenceError,
    RankAwareOptimizer,
    Reference,
    convert_lr,
    rank_aware_param_groups,
)
from rankaware_optim.inspection import as_reference

from ..helpers.models import mlp

LR = 1e-3
OWN = Reference(rank=16, alpha=32, fan_in=32)


@dataclass
class LoraConfig:
    """PEFT's own, in the fields that are read."""

    r: int = 16
    lora_alpha: int = 32
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"


class Attributes(dict):
    """A dict whose entries are attributes too, as OmegaConf's."""

    __getattr__ = dict.__getitem__


def peft_folder(path: Path, **config) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        "m.q.lora_A.weight": torch.zeros(16, 32),
        "m.q.lora_B.weight": torch.zeros(48, 16),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    saved = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "init_lora_weights": True,
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(saved))
    return path


def kohya_file(
    path: Path, metadata, names=("lora_unet_q", "lora_te_q"), rank=16
) -> Path:
    tensors = {}
    for width, name in zip((32, 64, 64), names, strict=False):
        tensors |= {
            f"{name}.lora_down.weight": torch.zeros(rank, width),
            f"{name}.alpha": torch.tensor(32.0),
        }
        tensors[f"{name}.lora_up.weight"] = torch.zeros(width, rank)
    save_file(tensors, path, {key: str(value) for key, value in metadata.items()})
    return path


# --- references -----------------------------------------------------------------------------------------------------

NAMED = [
    (lambda path: "r=16,alpha=32", Reference(rank=16, alpha=32)),
    (lambda path: str(peft_folder(path)), OWN),
    (lambda path: f"{peft_folder(path)}/", OWN),
    (lambda path: peft_folder(path / "r=16"), OWN),
    (lambda path: str(peft_folder(path / "r=16,alpha=8")), OWN),
    (lambda path: peft_folder(path, use_rslora=True), Reference(16, 128, fan_in=32)),
    (lambda path: kohya_file(path / "x.safetensors", {}, names=("lora_unet_q",)), OWN),
    (lambda path: LoraConfig(), Reference(rank=16, alpha=32)),
    (
        lambda path: LoraConfig(use_rslora=True),
        Reference(rank=16, alpha=32, rslora=True),
    ),
    (lambda path: "r=16,lora_alpha=32", Reference(16, 32)),
    (lambda path: "r=16,lora_alpha=32,use_rslora=True", Reference(16, 32, True)),
    (lambda path: "r=16, alpha=32, use_rslora=false", Reference(16, 32)),
    (lambda path: "method=full,batch=8", Reference(method="full", batch=8)),
    (lambda path: {"r": 16, "lora_alpha": 32}, Reference(16, 32)),
    (
        lambda path: {"r": "16", "lora_alpha": 32.5, "use_rslora": "True"},
        Reference(16, 32.5, True),
    ),
    (
        lambda path: {
            "r": 16,
            "lora_alpha": 32,
            "use_rslora": None,
            "target_modules": ["q_proj"],
            "init_lora_weights": "gaussian",
            "peft_type": "LORA",
            "rank_pattern": {},
        },
        Reference(16, 32),
    ),
    (
        lambda path: {"rank": 16, "alpha": 32, "init": "B", "fan_in": 64, "batch": 8},
        Reference(16, 32, init="B", fan_in=64, batch=8),
    ),
    (lambda path: Attributes(r=8, lora_alpha=8, fan_in=9), Reference(8, 8, fan_in=9)),
    (lambda path: {"r": 8, "lora_alpha": 8, "peft_type": None}, Reference(8, 8)),
    (
        lambda path: {"method": "full", "fan_in": 64},
        Reference(method="full", fan_in=64),
    ),
]


@pytest.mark.parametrize(("value", "reference"), NAMED)
def test_what_names_a_reference(value, reference, tmp_path):
    """Words, dicts, an adapter's folder or file, and a LoraConfig name a reference; an adapter's knows its width."""
    assert as_reference(value(tmp_path)) == reference


@pytest.mark.parametrize(
    "value", ["r=16,alpha=32", LoraConfig(), {"r": 16, "lora_alpha": 32}]
)
def test_a_named_reference_serves_as_a_written_one(value, tmp_path):
    """The optimizer, plain groups and conversions take a reference by name as they take a Reference."""
    written, made = Reference(rank=16, alpha=32), peft_folder(tmp_path)
    model = mlp()
    for at, same in ((value, written), (made, OWN), (str(made), OWN)):
        opts = [
            RankAwareOptimizer(model, "adamw", lr=LR, tuned_at=each)
            for each in (at, same)
        ]
        assert str(opts[0].report()) == str(opts[1].report())
        groups = [
            rank_aware_param_groups(model, lr=LR, tuned_at=each) for each in (at, same)
        ]
        assert [g["lr"] for g in groups[0]] == [g["lr"] for g in groups[1]] != [LR] * 5
        assert convert_lr(LR, from_=at, to="r=4,alpha=4") == convert_lr(
            LR, from_=same, to="r=4,alpha=4"
        )


def test_words_without_an_alpha_change_what_they_name():
    """to="r=64" keeps alpha, rsLoRA, init and width; with an alpha it stands alone."""
    like = Reference(16, 32, rslora=True, init="B", fan_in=64)
    assert as_reference("r=64", like=like) == Reference(
        64, 32, rslora=True, init="B", fan_in=64
    )
    assert as_reference("init=A", like=like) == Reference(
        16, 32, rslora=True, fan_in=64
    )
    assert as_reference({"r": 64}, like=like) == as_reference("r=64", like=like)
    assert as_reference("r=64,alpha=8", like=like) == Reference(64, 8)
    assert as_reference("full", like=like) == Reference(method="full")


REFUSED = [
    (lambda path: 3, InvalidReferenceError, "3 is not a reference"),
    (lambda path: None, InvalidReferenceError, "None is not a reference"),
    (lambda path: SimpleNamespace(r=16), InvalidReferenceError, "is not a reference"),
    (
        lambda path: "no/such/adapter",
        InspectionError,
        r"There is no folder or file no/such/adapter\. Give .* from the Hub",
    ),
    (lambda path: "x.safetensors", InspectionError, "There is no folder or file x.saf"),
    (lambda path: path / "missing", InspectionError, "There is no folder or file /"),
    (
        lambda path: "adapter",
        InvalidReferenceError,
        "'adapter' is not a part of a reference, and there is no folder of that name",
    ),
    (
        lambda path: "use_rslora=maybe,r=1,alpha=1",
        InvalidReferenceError,
        "'use_rslora=maybe' is not a part of a reference",
    ),
    (
        lambda path: "alpha=8,lora_alpha=8",
        InvalidReferenceError,
        "'lora_alpha=8' gives alpha a second time",
    ),
    (
        lambda path: {"r": 16, "alpha": 8, "lora_alpha": 8},
        InvalidReferenceError,
        "'lora_alpha=8' gives alpha a second time in {'r'",
    ),
    (
        lambda path: {"r": 16, "alpha": 32, "rsLoRA": True},
        InvalidReferenceError,
        "'rsLoRA=True' is not a part of a reference",
    ),
    (lambda path: {16: 32}, InvalidReferenceError, "'16=32' is not a part"),
    (lambda path: {"lora_alpha": 32}, InvalidReferenceError, "lacks rank"),
    (lambda path: {}, InvalidReferenceError, "lacks rank"),
    (lambda path: {"r": 1.5, "alpha": 8}, InvalidReferenceError, "rank=1.5"),
    (lambda path: {"r": "x", "alpha": 8}, InvalidReferenceError, "'r=x' is not a part"),
    (
        lambda path: {"method": "full", "r": 8},
        InvalidReferenceError,
        "Full finetuning has no rank",
    ),
    (
        lambda path: {"r": 8, "lora_alpha": 8, "init_lora_weights": "olora"},
        InvalidReferenceError,
        "A dict with init_lora_weights='olora' is not a reference",
    ),
    (lambda path: path, InspectionError, "has 0 .safetensors files"),
    (
        lambda path: LoraConfig(init_lora_weights="pissa"),
        InvalidReferenceError,
        "init_lora_weights='pissa'.*no law",
    ),
    (
        lambda path: LoraConfig(peft_type="LOHA"),
        InvalidReferenceError,
        "the kind 'LOHA'",
    ),
    (lambda path: LoraConfig(r=0), InvalidReferenceError, "rank=0"),
]


@pytest.mark.parametrize(("value", "error", "message"), REFUSED)
def test_what_names_none_is_refused(value, error, message, tmp_path):
    """Another thing, a path that is not there, and a configuration without a law are errors with cause and cure."""
    with pytest.raises(error, match=message):
        as_reference(value(tmp_path))
    with pytest.raises(error, match=message):
        convert_lr(LR, from_="r=16,alpha=32", to=value(tmp_path))


@pytest.mark.parametrize(
    ("value", "cure"),
    [
        ("r=16", "Give alpha=... too."),
        ({"r": 16}, "Give alpha=... too."),
        ("alpha=16", "Give rank=... too."),
        ("", "Give rank=..., or method='full' for a rate tuned by full finetuning."),
    ],
)
def test_half_a_reference_is_asked_for_the_other_half(value, cure):
    """A rank without alpha asks for alpha alone; only where there is neither is full finetuning an answer."""
    with pytest.raises(InvalidReferenceError) as caught:
        as_reference(value)
    assert str(caught.value).endswith(f"belongs to a rank and an alpha. {cure}")
