"""Tests of the layers of PEFT, LyCORIS and other libraries: their survey, output, start and training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankaware_optim import (
    InspectionError,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
    inspect_model,
)
from rankaware_optim.inspection import initialize, other_kind
from rankaware_optim.testing import check_convention

from ...helpers.llama import llama_config
from ...helpers.models import snapshot
from ...helpers.oracle import output_of
from ...helpers.real_adapters import (
    IN,
    OTHER_MODULES,
    OTHER_TUNERS,
    One,
    check_layer,
    dense,
    drawn,
    each_case,
    lycoris,
    other_tuner,
    peft,
    peft_experts,
)

# Libraries warn here of their own deprecated parts, of tied or unusual layers, and of a missing GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]


@each_case(["peft", "diffusers", "loralib", "lycoris-lora", "deepspeed"])
def test_a_librarys_layer(case):
    """The survey reads a layer as declared.

    The layer computes and trains accordingly, and another init leaves its output unchanged.
    """
    check_layer(case)


# --- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    return pytest.importorskip("peft")


def test_another_adapter_is_left_alone(lora):
    """`initialize` changes the active adapter only.

    An inactive adapter keeps its weights, scaling and configuration.
    """
    model = peft(dense)(4, 12.0)
    wide = lora.LoraConfig(r=8, lora_alpha=4, target_modules=["q"])
    model.add_adapter("wide", wide)
    config, before = str(model.peft_config["wide"]), snapshot(model)
    initialize(model, "B")
    after = snapshot(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.split(".")[-2] for name in moved} == {"default"}
    assert str(model.peft_config["wide"]) == config
    model.set_adapter("wide")
    found = inspect_model(model).factors
    assert {(f.init, f.scaling) for f in found} == {("A", 0.5)}


def mixture_of_loras(lora, folder, trainable: bool) -> nn.Module:
    """Return a tiny Llama under X-LoRA with two adapters of rank 4 and alpha 8, loaded from one folder."""
    transformers = pytest.importorskip("transformers")

    def llama():
        return transformers.LlamaForCausalLM(llama_config(use_cache=False))

    expert = lora.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    lora.get_peft_model(llama(), expert).save_pretrained(folder)
    config = lora.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        adapters=dict.fromkeys("01", str(folder)),
        use_trainable_adapters=trainable,
    )
    return lora.get_peft_model(llama(), config)


def test_mixed_experts_of_xlora_keep_the_base_rate(lora, tmp_path):
    """LoRA pairs under X-LoRA stay at the base learning rate, with a warning.

    If they are frozen, the survey raises an error.
    """
    model = mixture_of_loras(lora, tmp_path, trainable=True)
    survey = inspect_model(model)
    assert {(f.kind, f.init, f.rank) for f in survey.factors} == {("xlora", "other", 4)}
    assert len(survey.factors) == 8
    assert set(survey.unsupported.values()) == {"X-LoRA's classifier"}
    assert set(survey.unsupported) == set(survey.other)
    with pytest.warns(
        RankAwareWarning, match="^No scaling law covers X-LoRA: 8 "
    ) as said:
        opt = RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
    assert sum("covers X-LoRA" in str(w.message) for w in said) == 1
    assert {group.multiplier for group in opt.rates.groups} == {1.0}
    with pytest.raises(InspectionError, match="all of them are frozen"):
        inspect_model(mixture_of_loras(lora, tmp_path, trainable=False))


ALONE = {
    # PEFT's configuration class, its arguments, and the name in the warning
    "AdaptionPromptConfig": (
        {"adapter_len": 4, "adapter_layers": 1},
        "Adaption Prompt",
    ),
    "TrainableTokensConfig": ({"token_indices": [0, 1]}, "new tokens"),
    "ShadowConfig": ({}, "SHADOW"),
    "CartridgeConfig": ({"num_virtual_tokens": 4}, "prompt tuning"),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_method_of_whole_models_is_named(lora, name):
    """A method that needs a whole language model trains at the base learning rate, and a warning names it."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(lora, name):
        pytest.skip("this PEFT does not have it")
    settings, kind = ALONE[name]
    llama = transformers.LlamaForCausalLM(llama_config(use_cache=False))
    task = {} if name == "TrainableTokensConfig" else {"task_type": "CAUSAL_LM"}
    model = lora.get_peft_model(llama, getattr(lora, name)(**task, **settings))
    with pytest.warns(RankAwareWarning, match=f"No scaling law covers {kind}"):
        opt = RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
    assert {group.multiplier for group in opt.rates.groups} == {1.0}
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(opt.report().survey.unsupported) == trains == {*opt.rates}


def test_mica_keeps_the_base_rate(lora):
    """No scaling law covers MiCA, whose B is frozen and orthonormal, so A stays at the base learning rate."""
    try:
        model = peft(dense, init_lora_weights="mica")(4, 8.0)
    except ValueError:
        pytest.skip("this PEFT has no MiCA")
    for _ in range(2):
        with pytest.warns(RankAwareWarning, match="^No scaling law covers MiCA: 1 "):
            opt = RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
        (row,) = (row for row in opt.report().rows if row.role == "A")
        assert (row.init, row.multiplier) == ("other", 1.0)
        model(*drawn(2, IN)()).square().mean().backward()
        opt.step()
    with pytest.raises(InspectionError, match="requires a special init"):
        initialize(model, "B")


@pytest.mark.parametrize("part", ["a", "b"])
def test_block_diagonal_factors(lora, part):
    """BD-LoRA's block-diagonal A or B is read at its declared rank and passes the probe."""
    config = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(config, "BdLoraConfig"):
        pytest.skip("this PEFT has no BD-LoRA")
    blocks = config.BdLoraConfig(**{f"target_modules_bd_{part}": ["q"]}, nblocks=2)
    make = peft(dense, use_bdlora=blocks)
    assert check_convention(make, *drawn(4, IN)()) == pytest.approx(0.0, abs=1e-12)
    factors = inspect_model(make(4, 8.0)).factors
    assert {f.fan_in for f in factors} == {IN / 2 if part == "a" else IN}


def test_experts_whose_roles_are_swapped_are_refused(lora):
    """Experts stored as (experts, out, in), for which PEFT before 0.19 swaps A and B, raise an error."""
    for transposed in (True, False):
        model = peft_experts(transposed)(4, 8.0)
        # PEFT before 0.19 does not have this attribute
        del model.base_model.model.q._did_swap_in_out_features
        if transposed:
            assert {f.fan_in for f in inspect_model(model).factors} == {IN}
        else:
            with pytest.raises(InspectionError, match=r"PEFT swaps A and B.*0\.19"):
                inspect_model(model)


# --- frozen bases ---------------------------------------------------------------------------------------------------


def four_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        64, 128, compute_dtype=torch.float32, quant_type="nf4"
    ).to("cpu")
    assert layer.weight.shape == (64 * 128 // 2, 1)
    return layer


def eight_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear8bitLt(64, 128, has_fp16_weights=False).to("cpu")


def int8_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 128)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


@pytest.mark.parametrize("base", [four_bit, eight_bit, int8_of_torchao])
def test_quantised_bases(lora, base):
    """For a quantised base layer, the survey has the layer's fans instead of the packed weight's,
    and the adapter trains.
    """
    model = One(base())
    model.is_loaded_in_4bit = base is four_bit
    model.is_loaded_in_8bit = base is eight_bit
    config = lora.LoraConfig(r=4, lora_alpha=8, target_modules=["q"])
    model = lora.get_peft_model(model, config)
    # PEFT has a class of its own for this base layer
    assert type(model.base_model.model.q) is not lora.tuners.lora.Linear
    factors = inspect_model(model).factors
    seen = {(f.rank, f.scaling, f.fan_in, f.fan_out, f.init) for f in factors}
    assert seen == {(4, 2.0, 64.0, 128.0, "A")}
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2)
    start = snapshot(model)
    output_of(model, torch.randn(4, 64)).square().mean().backward()
    opt.step()
    assert not any(model.get_parameter(f.name).equal(start[f.name]) for f in factors)


# --- adapters that are no LoRA pair ---------------------------------------------------------------------------------


def of_peft(name):
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    if name not in {kind.value for kind in mapping}:
        pytest.skip(f"this PEFT has no {name}")
    return other_tuner(name), OTHER_TUNERS[name][0]


def of_lycoris(name):
    pytest.importorskip("lycoris")
    return lycoris(name, lambda: nn.Linear(16, 16))(4, 8.0), OTHER_MODULES[name]


OTHERS = [(of_peft, name) for name in OTHER_TUNERS]
OTHERS += [(of_lycoris, name) for name in OTHER_MODULES]


@pytest.mark.parametrize(("build", "name"), OTHERS)
def test_other_methods_stay_at_the_base_rate(build, name):
    """A method of PEFT or LyCORIS without LoRA pairs trains at the base learning rate, and a
    warning names it.
    """
    torch.manual_seed(0)
    model, kind = build(name)
    survey = inspect_model(model)
    assert survey.factors == ()
    assert kind in {other_kind(name) for name in survey.other}
    at_16 = Reference(rank=16, alpha=16)
    with pytest.warns(RankAwareWarning, match=f"No scaling law covers {kind}"):
        opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3, tuned_at=at_16)
    assert {g["lr"] for g in opt.param_groups} == {1e-3}
    assert sum(len(g["params"]) for g in opt.param_groups) == len(survey.other)
