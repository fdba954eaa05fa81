"""References from strings, from PEFT's configuration and from adapters on disk."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankaware_optim import (
    InspectionError,
    InvalidReferenceError,
    RankAwareWarning,
    Reference,
    convert_lr,
    inspect_file,
    suggest_lr,
)
from rankaware_optim.inspection import as_reference, parse_reference

from ..helpers.adapters import peft_folder

LR = 1e-3
OWN = Reference(rank=16, alpha=32, fan_in=32)


@dataclass
class LoraConfig:
    """A stand-in for PEFT's LoraConfig, with the entries that are read."""

    r: int = 16
    lora_alpha: int = 32
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"


def folder(path: Path, **config) -> Path:
    """Make a PEFT folder with one adapted layer of fan-in 32, and return its path."""
    return peft_folder(path, rank=16, init_lora_weights=True, **config)


def kohya_file(path: Path) -> Path:
    """Write a file as kohya's scripts do, with one adapted layer of fan-in 32, and return its path."""
    tensors = {
        "lora_unet_q.lora_down.weight": torch.zeros(16, 32),
        "lora_unet_q.lora_up.weight": torch.zeros(32, 16),
        "lora_unet_q.alpha": torch.tensor(32.0),
    }
    save_file(tensors, path / "x.safetensors")
    return path / "x.safetensors"


def test_an_assumed_scaling_is_said(tmp_path):
    """For a file without alpha, a scaling of 1 is assumed, with a warning if the file is a
    reference, and a note in a suggestion.
    """
    tensors = {
        "q.lora_A.weight": torch.zeros(16, 32),
        "q.lora_B.weight": torch.zeros(32, 16),
    }
    path = tmp_path / "plain.safetensors"
    save_file(tensors, path)
    with pytest.warns(RankAwareWarning, match="1 is assumed"):
        assert as_reference(path).scaling == 1.0
    assert "1 is assumed" in str(suggest_lr(inspect_file(path)))


AT, FULL = Reference(rank=16, alpha=32), Reference(method="full")
NAMED = [
    ("r=16,alpha=32", AT),
    (" rank = 16 , alpha=32.5, ", replace(AT, alpha=32.5)),
    ("r=16,alpha=32,rslora", replace(AT, rslora=True)),
    ("r=16, alpha=32, rslora=True", replace(AT, rslora=True)),
    ("r=16, alpha=32, rslora=false", AT),
    (
        "r=16,alpha=32,init=B,fan_in=8,batch=4",
        Reference(16, 32, False, "B", 8, batch=4),
    ),
    ("full", FULL),
    ("full, fan_in=4096, batch=8", replace(FULL, fan_in=4096, batch=8)),
    ("method=full,batch=8", replace(FULL, batch=8)),
    (LoraConfig(), AT),
    (LoraConfig(use_rslora=True), replace(AT, rslora=True)),
    (LoraConfig(init_lora_weights="gaussian", peft_type=None), AT),
    (SimpleNamespace(r=8, lora_alpha=8), Reference(8, 8)),
]
ADAPTERS = [
    lambda path: str(folder(path)),
    lambda path: f"{folder(path)}/",
    lambda path: folder(path / "r=16"),
    lambda path: str(folder(path / "r=16,alpha=8")),
    lambda path: folder(path, lora_alpha=8, use_rslora=True),
    kohya_file,
]


@pytest.mark.parametrize(("value", "reference"), NAMED, ids=lambda v: str(v)[:40])
def test_what_names_a_reference(value, reference):
    """Strings and PEFT's LoraConfig are converted to references."""
    assert as_reference(value) == reference


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_names_a_reference(adapter, tmp_path):
    """The folder or file of an adapter is converted to a reference with its configuration and
    fan-in, whatever its name is.
    """
    assert as_reference(adapter(tmp_path)) == OWN


def test_a_string_that_is_a_reference_is_never_read_as_a_path(tmp_path, monkeypatch):
    """If the working folder contains a folder called "full" or "r=16,alpha=32", these strings still
    name the configuration.
    """
    monkeypatch.chdir(tmp_path)
    for text in ("full", "r=16,alpha=32"):
        Path(text).mkdir()
        assert as_reference(text) == parse_reference(text)


def test_an_adapters_fan_in_is_the_mean_of_its_layers(tmp_path):
    """The fan-in of an adapter is the mean over its layers, weighted by their size, as the law uses it for LoRA."""
    tensors = {}
    for name, fan_in, fan_out in (("up", 16, 64), ("down", 64, 32)):
        tensors[f"{name}.lora_A.weight"] = torch.zeros(4, fan_in)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(fan_out, 4)
    path = tmp_path / "two.safetensors"
    save_file(tensors, path)
    mean = (16 * 16 * 64 + 64 * 64 * 32) / (16 * 64 + 64 * 32)
    with pytest.warns(RankAwareWarning, match="1 is assumed"):
        assert as_reference(path).fan_in == pytest.approx(mean)
    survey = inspect_file(path)
    of_full = Reference(method="full").resolve(survey)
    assert (survey.width, of_full.fan_in) == (pytest.approx(mean), 64)


LIKE = Reference(16, 32, rslora=True, init="B", fan_in=64)
CHANGED = [
    ("r=64", replace(LIKE, rank=64)),
    ("init=A", replace(LIKE, init="A")),
    ("r=64,alpha=8", Reference(64, 8)),
    ("full", FULL),
]


@pytest.mark.parametrize(("value", "reference"), CHANGED)
def test_words_without_an_alpha_change_what_they_name(value, reference):
    """A string such as "r=64" keeps alpha, rsLoRA, init and fan-in of the other reference, but
    "full" or a string with an alpha keeps nothing.
    """
    assert as_reference(value, like=LIKE) == reference


REFUSED = [
    *("r=16", "alpha=16", "", "adapter", "16", "=", "r=x,alpha=1", "r=1.5,alpha=1"),
    *("no/such/adapter", "x.safetensors", Path("missing"), Path()),
    *("r=" + "9" * 5000 + ",alpha=1", "r=1" + "0" * 400 + ",alpha=1"),
    *("r=8,alpha=8,init=C", "r=8,alpha=8,beta=1", "rslora=maybe,r=1,alpha=1"),
    *("alpha=8,alpha=8", "r=8,rank=16,alpha=8", "full,full", "full,rslora"),
    *(3, None, SimpleNamespace(r=16), {"r": 16, "lora_alpha": 32}),
    LoraConfig(init_lora_weights="pissa"),
    LoraConfig(peft_type="LOHA"),
    LoraConfig(r=0),
    LoraConfig(r=1.5),
    LoraConfig(r=None),
    LoraConfig(use_rslora="false"),
]


@pytest.mark.parametrize("text", ["", " ", ","])
def test_an_empty_text_changes_nothing_silently(text):
    """An empty string as `to`, for example from an empty shell variable, raises an error."""
    with pytest.raises(InvalidReferenceError, match="is empty"):
        as_reference(text, like=LIKE)


IMPOSSIBLE = [{"method": "Full"}, {"rslora": "false"}, {"rslora": 1}, {"rslora": None}]


@pytest.mark.parametrize("values", IMPOSSIBLE, ids=str)
def test_a_reference_takes_no_value_for_another(values):
    """A method in capitals, and a string in place of True or False, raise an error that names the
    argument and the value.
    """
    [(name, value)] = values.items()
    with pytest.raises(InvalidReferenceError, match=name) as caught:
        Reference(16, 32, **values)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", REFUSED, ids=lambda v: str(v)[:40])
def test_what_names_none_is_refused(value, tmp_path, monkeypatch):
    """A value that describes no reference, a missing path, and a configuration without a scaling
    law raise an error.
    """
    monkeypatch.chdir(tmp_path)
    for ask in (as_reference, lambda v: convert_lr(LR, from_=v, to="r=16,alpha=32")):
        with pytest.raises((InvalidReferenceError, InspectionError)):
            ask(value)


letters = st.text(alphabet="ralphinkutoc_=,.0123456789eAB ", max_size=40)


@given(letters | st.text(max_size=12))
@settings(max_examples=500)
def test_any_text_is_a_reference_or_our_error(text):
    """Every string is parsed into a reference or raises an InvalidReferenceError."""
    with contextlib.suppress(InvalidReferenceError):
        assert isinstance(parse_reference(text), Reference)
