"""Files that PEFT, LyCORIS and diffusers themselves write: from the header alone the survey is the live model's."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import rankaware_optim as ra
from rankaware_optim import inspect_file
from rankaware_optim._types import Survey
from rankaware_optim.cli._main import main
from rankaware_optim.inspection._peft_config import _by_pattern

peft = pytest.importorskip("peft")


class Experts(nn.Module):
    """Two stacks of four experts' weights, bare parameters as in transformers' mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 24))
        self.down_proj = nn.Parameter(torch.randn(4, 12, 16))


class Model(nn.Module):
    """A layer of every kind that PEFT adapts, and a head."""

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
        self.experts = Experts()
        self.head = nn.Linear(16, 3)


def lora(**settings) -> object:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], **settings}
    )


PATTERNS = {
    "rank_pattern": {"0.v": 2, "layers.1.q": 8},
    "alpha_pattern": {"v": 32, "^layers.0.q": 1},
}
SAVED = {
    "linear": lambda: lora(),
    "head": lambda: lora(modules_to_save=["head"]),
    "patterns": lambda: lora(**PATTERNS),
    "rslora": lambda: lora(use_rslora=True),
    "rslora, patterns": lambda: lora(use_rslora=True, **PATTERNS),
    "dora": lambda: lora(use_dora=True),
    "embedding": lambda: lora(target_modules=["embed", "q"]),
    "conv": lambda: lora(target_modules=["conv", "grouped"]),
    "attention": lambda: lora(
        target_modules=["attention"], alpha_pattern={"attention": 2}
    ),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "both drawn": lambda: lora(init_lora_weights=False),
    "bias": lambda: lora(lora_bias=True),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=12, total_step=10, target_modules=["q", "v"]
    ),
}


def facts(survey: Survey, prefix: str = "") -> dict[tuple[str, str], tuple]:
    """What a law needs to know of each factor, by layer and role."""
    return {
        (f"{prefix}{f.layer}", f.role): (
            f.rank,
            f.fan_in,
            f.fan_out,
            pytest.approx(f.scaling),
            f.init,
            f.kind,
        )
        for f in survey.factors
    }


def conventions(survey: Survey) -> set[str]:
    return {f.convention for f in survey.factors}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAVED)
def test_a_folder_saved_by_peft_is_the_live_model(name, tmp_path):
    """Rank, fans, scaling, init, kind and convention of every factor."""
    model = peft.get_peft_model(Model(), SAVED[name]())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    live, saved = ra.inspect_model(model), inspect_file(tmp_path)
    assert facts(saved) == facts(live)
    assert conventions(saved) == conventions(live)
    assert saved.notes == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "shown"),
    [("LoHaConfig", "LoHa"), ("LoKrConfig", "LoKr"), ("VeraConfig", "VeRA")],
)
def test_an_adapter_without_a_law_is_named(kind, shown, tmp_path):
    """A folder of another kind is a survey without factors, whose tensors `rankaware inspect` names by kind."""
    peft.get_peft_model(
        Model(), getattr(peft, kind)(r=4, target_modules=["q"])
    ).save_pretrained(tmp_path)
    survey = inspect_file(tmp_path)
    done = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert (survey.factors, done.exit_code) == ((), 0)
    assert f"{shown}: no law, the base rate" in done.output


@pytest.mark.filterwarnings("ignore")
def test_inspect_prints_what_peft_saved(tmp_path):
    """The command says rank and scaling of a folder by PEFT, and a rate for every module if asked."""
    peft.get_peft_model(Model(), lora(**PATTERNS)).save_pretrained(tmp_path)
    options = ["--lr", "2e-4", "--tuned-at", "r=4,alpha=8", "--per-module"]
    done = CliRunner().invoke(main, ["inspect", str(tmp_path), *options])
    assert done.exit_code == 0
    assert done.output.count("default law: from rank 4, alpha 8") == 8
    assert "base_model.model.layers.1.v.lora_B.weight" in done.output


KEYS = ["q", "0.q", "layers.0.q", "^layers.0.q", "layers", "a.b", "^v", "0_q"]


@pytest.mark.parametrize("order", [KEYS, KEYS[::-1], KEYS[:3], KEYS[4:6]], ids=len)
def test_patterns_are_peft_s(order):
    """The first key that matches is the one that PEFT takes."""
    names = ["q", "v", "layers.0.q", "layers.10.q", "m.layers.0.q", "layers", "axb"]
    values = {key: number for number, key in enumerate(order)}
    for name in names:
        key = peft.utils.other.get_pattern_key(order, name)
        assert _by_pattern(name, values, None) == values.get(key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "experts by target_parameters"),
        ({"rank_pattern": {r"layers\.[1-9]\.v": 8}}, "is no plain name"),
    ],
)
def test_what_a_file_does_not_tell_is_refused(settings, message, tmp_path):
    """Experts of target_parameters and patterns that are regexes are read off the live model alone."""
    model = peft.get_peft_model(Model(), lora(**settings))
    model.save_pretrained(tmp_path)
    assert ra.inspect_model(model).factors
    with pytest.raises(ra.InspectionError, match=f"{message}.*inspect_model"):
        inspect_file(tmp_path)


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
    dims = {
        "linear_dim": 4,
        "linear_alpha": 2,
        "conv_dim": 4,
        "conv_alpha": 1,
        "algo": "locon",
    }
    return lycoris.create_lycoris(Model(), 1.0, **{**dims, **settings})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_saved_by_lycoris_is_the_live_network(name, tmp_path):
    """Rank, fans, scaling, kind and convention of linear layers, convolutions and Tucker cores, in kohya's keys."""
    network = lycoris_network(**NETWORKS[name])
    network.apply_to()
    network.save_weights(
        str(tmp_path / "x.safetensors"),
        torch.bfloat16,
        {"ss_network_module": "lycoris.kohya"},
    )
    saved = inspect_file(tmp_path / "x.safetensors")
    live = ra.inspect_model(network, init="A")
    assert {key: value[:4] for key, value in facts(saved).items()} == {
        k: v[:4] for k, v in facts(live).items()
    }
    assert conventions(saved) == conventions(live)
    assert {f.init for f in saved.factors} == {"unknown"}
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.safetensors")])
    assert done.exit_code == 0
    assert "lora_down/lora_up" in done.output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ["loha", "lokr", "glora"])
def test_lycoris_s_other_kinds_are_named(algorithm, tmp_path):
    """LoHa, LoKr and GLoRA files are surveys without factors, and their alphas no tensors."""
    network = lycoris_network(algo=algorithm)
    network.apply_to()
    network.save_weights(str(tmp_path / "x.safetensors"), None, None)
    survey = inspect_file(tmp_path / "x.safetensors")
    assert survey.factors == ()
    assert survey.other
    assert not any(name.endswith(".alpha") for name in survey.other)


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    """A small UNet of diffusers with adapters of two ranks."""
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    made.add_adapter(
        lora(
            target_modules=targets, rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 1}
        )
    )
    return made


def save(unet, folder, state, **metadata) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, unet_lora_layers=state, **metadata
    )


@pytest.mark.filterwarnings("ignore")
def test_a_file_saved_by_diffusers_is_the_live_model(unet, tmp_path):
    """save_lora_weights with its metadata: the ranks, fans, scalings and inits of the live UNet."""
    config = unet.peft_config["default"].to_dict()
    save(
        unet,
        tmp_path,
        peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=config,
    )
    saved, live = inspect_file(tmp_path), ra.inspect_model(unet)
    assert facts(saved) == facts(live, "unet.")
    assert conventions(saved) == conventions(live) == {"peft"}


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_save_lora_adapter_is_the_live_model(unet, tmp_path):
    """The model's own method writes the configuration without a part's name."""
    unet.save_lora_adapter(tmp_path)
    assert facts(inspect_file(tmp_path)) == facts(ra.inspect_model(unet))


@pytest.mark.filterwarnings("ignore")
def test_old_keys_of_diffusers_are_read(unet, tmp_path):
    """In the keys of earlier releases there is no alpha: rank and fans are right, the scaling is 1 with a note."""
    from diffusers.utils import convert_state_dict_to_diffusers

    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    assert any(".lora.down." in key for key in state)
    save(unet, tmp_path, state)
    saved, live = inspect_file(tmp_path), ra.inspect_model(unet)
    assert {k: v[:3] for k, v in facts(saved).items()} == {
        k: v[:3] for k, v in facts(live, "unet.").items()
    }
    assert {f.scaling for f in saved.factors} == {1.0}
    assert any("scaling 1 is assumed" in note for note in saved.notes)


@pytest.mark.filterwarnings("ignore")
def test_a_config_of_another_adapter_is_refused(tmp_path):
    """PEFT's folder with the configuration of a run at another rank: both numbers are named."""
    peft.get_peft_model(Model(), lora()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 64}))
    with pytest.raises(
        ra.InspectionError,
        match=r"adapter_config\.json, declares rank 64 but .* has shape \(4, 16\)",
    ):
        inspect_file(tmp_path)
