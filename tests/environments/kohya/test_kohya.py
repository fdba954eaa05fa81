"""The network module on kohya's own networks, in a clone of sd-scripts that SD_SCRIPTS names."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from rankaware_optim import OptimizerError, Reference

from ...helpers.examples import EXAMPLES

CLONE = os.environ.get("SD_SCRIPTS", "")
if not Path(CLONE, "networks", "lora.py").is_file():
    pytest.skip("SD_SCRIPTS names no clone of sd-scripts", allow_module_level=True)

diffusers = pytest.importorskip("diffusers")
LR, TE_LR = 1e-3, 1e-4


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The clone in front of sys.path, as its scripts have it."""
    monkeypatch.syspath_prepend(CLONE)
    yield
    for name in [
        name
        for name in sys.modules
        if name.partition(".")[0] in ("networks", "library")
    ]:
        del sys.modules[name]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=64, **sizes))


def network(name="rankaware_optim.integrations.kohya", **arguments):
    """What train_network.py does with --network_module and --network_args, up to its optimizer's groups."""
    made = unet()
    texts = [encoder()]
    net = importlib.import_module(name).create_network(
        1.0, 64, 64, None, texts, made, neuron_dropout=None, **arguments
    )
    args = types.SimpleNamespace(network_module=name)
    net.prepare_network(args) if hasattr(net, "prepare_network") else None
    net.apply_to(texts, made, True, True)
    return net, args.network_module


def test_groups_are_split_by_rank_and_keep_their_rates_ratio():
    """The text encoder's and the U-Net's groups keep their own rates, each factor's multiplied by the law."""
    net, named = network(rankaware_tuned_at="r=16,alpha=16")
    groups, descriptions = net.prepare_optimizer_params(TE_LR, LR, LR)
    plain, plain_descriptions = network("networks.lora")[0].prepare_optimizer_params(
        TE_LR, LR, LR
    )
    assert named == "networks.lora"
    assert sum(len(g["params"]) for g in groups) == sum(len(g["params"]) for g in plain)
    assert set(descriptions) == set(plain_descriptions)
    for group, description in zip(groups, descriptions, strict=True):
        base = TE_LR if "text" in description else LR
        assert group["lora_rank"] == 64
        assert group["rank_multiplier"] != 1.0
        assert group["lr"] == pytest.approx(base * group["rank_multiplier"])


@pytest.mark.parametrize("delegate", ["networks.lora", "networks.lora_fa"])
def test_native_optimizer_and_scheduler_keep_the_ratio(delegate):
    """The scripts' AdamW steps on these groups, and their cosine schedule keeps the ratio."""
    net, _ = network(rankaware_tuned_at="r=16,alpha=16", rankaware_network=delegate)
    found = net.prepare_optimizer_params(TE_LR, LR, LR)
    groups = found[0] if isinstance(found, tuple) else found
    start = [p.detach().clone() for g in groups for p in g["params"]]
    opt = torch.optim.AdamW(groups, lr=LR)
    schedule = diffusers.optimization.get_scheduler(
        "cosine", optimizer=opt, num_warmup_steps=0, num_training_steps=4
    )
    first = [g["lr"] for g in opt.param_groups]
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()
    schedule.step()
    moved = [p.detach() for g in opt.param_groups for p in g["params"]]
    assert not any(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    ratios = [g["lr"] / lr for g, lr in zip(opt.param_groups, first, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert ratios[0] < 1.0


def test_flux_networks_own_method_is_taken():
    """A network that hands out groups by text encoder has that method replaced."""
    pytest.importorskip("networks.lora_flux", exc_type=ImportError)
    from networks.lora_flux import LoRANetwork

    from rankaware_optim.integrations.kohya import _adapted

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.Linear(32, 32)

    Block.__name__ = "DoubleStreamBlock"
    flux = torch.nn.Sequential(Block(), Block())
    net = _adapted(
        LoRANetwork([], flux, lora_dim=64, alpha=64),
        "networks.lora_flux",
        {"tuned_at": Reference(16, 16)},
    )
    net.apply_to([], flux, False, True)
    groups, descriptions = net.prepare_optimizer_params_with_multiple_te_lrs(
        None, LR, LR
    )
    assert len(groups) == len(descriptions) == 2
    assert all(
        g["lr"] == pytest.approx(LR * g["rank_multiplier"])
        and g["rank_multiplier"] != 1.0
        for g in groups
    )


@pytest.mark.parametrize(
    "given",
    [
        {"rankaware_recipe": "r.toml"},
        {"rankaware_rnk": "4"},
        {"rankaware_batch": "many"},
    ],
)
def test_settings_that_cannot_be_are_refused(given):
    """A recipe, an unknown name and an unreadable value, each with a sentence."""
    with pytest.raises(OptimizerError):
        network(**given)


def test_the_examples_arguments_are_taken():
    """examples/kohya.sh's network arguments, read as train_network.py reads them, make a network at the moved rate."""
    flags = shlex.split(
        (EXAMPLES / "kohya.sh").read_text().replace("\\\n", " "), comments=True
    )
    start = flags.index("--network_args") + 1
    stop = next(i for i in range(start, len(flags)) if flags[i].startswith("--"))
    arguments = dict(flag.split("=", 1) for flag in flags[start:stop])
    net, _ = network(flags[flags.index("--network_module") + 1], **arguments)
    groups, _ = net.prepare_optimizer_params(TE_LR, LR, LR)
    assert all(group["rank_multiplier"] != 1.0 for group in groups)
