"""Tests that the survey of a file written by PEFT, LyCORIS or diffusers equals that of the live model.

Only the header of the file is read.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim import Factor, inspect_file
from rankaware_optim.inspection import Survey
from rankaware_optim.inspection._peft_config import _by_pattern

peft = pytest.importorskip("peft")
# the libraries warn of things that these tests do on purpose
pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    """A model with a layer of every kind that PEFT adapts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(16, 24) for n in ("q", "k", "v")})
            for _ in range(2)
        )
        self.conv = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 3)


def lora(kind=peft.LoraConfig, **settings) -> object:
    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
    return kind(**{**usual, **settings})


PATTERNS = {
    "rank_pattern": {"0.v": 2, "layers.1.q": 8},
    "alpha_pattern": {"v": 32, "^layers.0.q": 1},
}
SAVED = {
    "linear": {},
    "head": {"modules_to_save": ["head"]},
    "patterns": PATTERNS,
    "rslora, patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed", "q"]},
    "conv": {"target_modules": ["conv", "grouped"]},
    "attention": {
        "target_modules": ["attention"],
        "alpha_pattern": {"attention": 2},
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "both drawn": {"init_lora_weights": False},
    "bias": {"lora_bias": True},
    # AdaLoRA counts with its initial rank, although training would lower the rank
    "adalora": {
        "kind": peft.AdaLoraConfig,
        "init_r": 6,
        "target_r": 3,
        "total_step": 10,
    },
}


def facts(survey: Survey, prefix: str = "", **same) -> set[Factor]:
    """Return the LoRA matrices of a survey without names, with rounded scalings, and with the
    values of `same` for all.
    """
    return {
        replace(
            f,
            **{
                "name": "",
                "layer": f"{prefix}{f.layer.removesuffix('.lora')}",
                "scaling": round(f.scaling, 9),
                **same,
            },
        )
        for f in survey.factors
    }


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_saved_by_peft_is_the_live_model(name, tmp_path):
    """A folder saved by PEFT gives the rank, fans, scaling, init, kind and convention of every LoRA matrix."""
    model = peft.get_peft_model(Model(), lora(**SAVED[name]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    live, saved = ra.inspect_model(model), inspect_file(tmp_path)
    assert facts(saved) == facts(live)
    assert saved.notes == ()


KEYS = ["q", "0.q", "layers.0.q", "^layers.0.q", "layers", "a.b", "^v", "0_q"]


@pytest.mark.parametrize("order", [KEYS, KEYS[::-1], KEYS[:3], KEYS[4:6]], ids=len)
def test_patterns_are_peft_s(order):
    """If several keys of a pattern match a layer's name, ours and PEFT's choice is the same."""
    names = ["q", "v", "layers.0.q", "layers.10.q", "m.layers.0.q", "layers", "axb"]
    values = {key: number for number, key in enumerate(order)}
    for name in names:
        key = peft.utils.other.get_pattern_key(order, name)
        assert _by_pattern(name, values, None) == values.get(key)


# --- LyCORIS --------------------------------------------------------------------------------------------------------

NETWORKS = {
    "linear and conv": {},
    "tucker": {"use_tucker": True},
    "rs_lora": {"rs_lora": True},
    "dora": {"dora_wd": True},
    "scalar": {"use_scalar": True},
}


def lycoris_network(**settings) -> nn.Module:
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    linear, conv = (
        {"linear_dim": 4, "linear_alpha": 2},
        {"conv_dim": 4, "conv_alpha": 1},
    )
    usual = {"algo": "locon", **linear, **conv}
    network = lycoris.create_lycoris(Model(), 1.0, **{**usual, **settings})
    network.apply_to()
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_saved_by_lycoris_is_the_live_network(name, tmp_path):
    """A file of LyCORIS with kohya's keys gives all facts of linear layers, convolutions and Tucker
    cores but the init.
    """
    network, path = lycoris_network(**NETWORKS[name]), tmp_path / "x.safetensors"
    metadata = {"ss_network_module": "lycoris.kohya"}
    network.save_weights(str(path), torch.bfloat16, metadata)
    saved, live = inspect_file(path), ra.inspect_model(network, init="A")
    assert facts(saved, init="A") == facts(live)
    assert {f.init for f in saved.factors} == {"unknown"}


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    """Return a small UNet of diffusers with adapters of two ranks."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=12,
        attention_head_dim=4,
        block_out_channels=(8,),
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    own = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 1}}
    model.requires_grad_(False).add_adapter(lora(target_modules=targets, **own))
    return model


def by_its_loader(unet, folder):
    """Save the adapter with `save_lora_weights` of a pipeline, with its metadata."""
    config = unet.peft_config["default"].to_dict()
    state = peft.get_peft_model_state_dict(unet)
    save(folder, unet_lora_layers=state, unet_lora_adapter_metadata=config)


def by_itself(unet, folder):
    """Save the adapter with the model's own method, which writes the metadata without a prefix."""
    unet.save_lora_adapter(folder)


def save(folder, **what) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, **what)


@pytest.mark.parametrize(
    ("written", "prefix"), [(by_its_loader, "unet."), (by_itself, "")]
)
def test_a_file_saved_by_diffusers_is_the_live_model(unet, written, prefix, tmp_path):
    """The survey of the file equals that of the live UNet, whichever method of diffusers saved it."""
    written(unet, tmp_path)
    saved, live = inspect_file(tmp_path), ra.inspect_model(unet)
    assert facts(saved) == facts(live, prefix)
    assert {f.convention for f in live.factors} == {"peft"}
