"""Inspection against the libraries themselves: what is read, the ones-probe, the oracle, and what is no LoRA pair."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankaware_optim import (
    InspectionError,
    RankAwareOptimizer,
    Reference,
    inspect_model,
)
from rankaware_optim.inspection import other_kind
from rankaware_optim.testing import check_convention

from ...helpers.oracle import oracle, output_of
from ...helpers.real_adapters import (
    CASES,
    IN,
    OTHER_MODULES,
    OTHER_TUNERS,
    OUT,
    One,
    dense,
    drawn,
    lycoris,
    other_tuner,
    peft,
    peft_attention,
    peft_experts,
    read,
)

# What libraries warn of here: deprecated parts of their own, tied or unusual layers, no accelerator.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]

AT_16 = Reference(rank=16, alpha=16)
HERE = [case for case in CASES if case.package not in ("torchtune", "litgpt")]
by_name = pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)


def needs(case):
    if not case.installed():
        pytest.skip(f"needs {case.package}")


@by_name
@pytest.mark.parametrize(("rank", "alpha"), [(2, 3.0), (4, 8.0)])
def test_a_layer_is_read_as_declared(case, rank, alpha):
    """Convention, rank, fans, scaling, init, kind and the rest's kind are those of the library's own arguments."""
    needs(case)
    torch.manual_seed(0)
    assert read(case.make(rank, alpha)) == case.expected(rank, alpha)


@by_name
def test_a_layer_computes_and_trains_as_read(case):
    """The ones-probe moves the output by scaling × rank × inner × fan-in, and reparametrised trainings agree."""
    needs(case)
    found = check_convention(case.make, *case.inputs(), run=output_of)
    assert (found.probe is not None) is case.probed
    assert oracle(case.make, *case.inputs()) < 1e-9


# --- several adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    return pytest.importorskip("peft")


def test_inactive_and_frozen_adapters_are_said(lora):
    """Of three adapters only the active one counts; the others are named as frozen, also after requires_grad=False."""
    model = peft(dense)(4, 8.0)
    for name in ("second", "third"):
        model.add_adapter(
            name, lora.LoraConfig(r=8, lora_alpha=8, target_modules=["q"])
        )
    model.set_adapter("second")
    survey = inspect_model(model)
    assert {(f.adapter, f.rank, f.scaling) for f in survey.factors} == {
        ("second", 8, 1.0)
    }
    assert [name.split(".")[-2:] for name in survey.frozen] == [
        [adapter, "weight"] for adapter in ("default", "default", "third", "third")
    ]
    model.requires_grad_(False)
    with pytest.raises(InspectionError, match="6 LoRA factors found, all frozen"):
        inspect_model(model)


def test_the_second_copy_of_out_proj_is_dead(lora):
    """PEFT's attention adapts out_proj twice where that is a target too; one copy has no gradient."""
    with pytest.raises(AssertionError, match=r"depend on .*attn\.out_proj\.lora_A"):
        oracle(peft_attention("attn", "out_proj"), *drawn(2, 5, IN)())


@pytest.mark.parametrize("part", ["a", "b"])
def test_block_diagonal_factors(lora, part):
    """BD-LoRA's block-diagonal A or B is read at its declared rank and passes the probe."""
    config = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(config, "BdLoraConfig"):
        pytest.skip("this PEFT has no BD-LoRA")
    blocks = config.BdLoraConfig(**{f"target_modules_bd_{part}": ["q"]}, nblocks=2)
    found = check_convention(peft(dense, use_bdlora=blocks), *drawn(4, IN)())
    assert found.probe == pytest.approx(0.0, abs=1e-12)
    assert {f.fan_in for f in found.factors} == {IN / 2 if part == "a" else IN}


def test_experts_whose_roles_are_swapped_are_refused(lora):
    """PEFT before 0.19 swaps A and B of experts stored as (experts, out, in): that is an error with a cure."""
    for transposed in (True, False):
        model = peft_experts(transposed, "up")(4, 8.0)
        # as those versions have none
        del model.base_model.model.q._did_swap_in_out_features
        if transposed:
            assert {f.fan_in for f in inspect_model(model).factors} == {IN}
        else:
            with pytest.raises(
                InspectionError, match=r"swaps A and B of experts.* Install PEFT 0\.19"
            ):
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
    """The fans of a quantised base are those of the layer, whatever its weight's shape, and it trains on the CPU."""
    torch.manual_seed(0)
    model = One(base())
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = (
        base is four_bit,
        base is eight_bit,
    )
    model = lora.get_peft_model(
        model, lora.LoraConfig(r=4, lora_alpha=8, target_modules=["q"])
    )
    # PEFT's own layer for the base
    assert type(model.base_model.model.q) is not lora.tuners.lora.Linear
    assert {
        (f.rank, f.scaling, f.fan_in, f.fan_out, f.init)
        for f in inspect_model(model).factors
    } == {(4, 2.0, 64.0, 128.0, "A")}
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    x, losses = torch.randn(4, 64), []
    for _ in range(4):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_meta_models(lora):
    """A model on the meta device is read from shapes and declarations alone."""
    with torch.device("meta"):
        model = peft(dense)(4, 8.0)
    assert {
        (f.rank, f.fan_in, f.fan_out, f.init) for f in inspect_model(model).factors
    } == {(4, IN, OUT, "A")}


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
def test_latent_attention_is_no_adapter(lora, family):
    """The low-rank projections and `…_lora_rank` of multi-head latent attention are no pairs; PEFT's on top are."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert any(getattr(module, "kv_lora_rank", None) == 4 for module in model.modules())
    with pytest.raises(InspectionError, match="No trainable LoRA pair"):
        inspect_model(model)
    survey = inspect_model(
        lora.get_peft_model(model, lora.LoraConfig(r=2, target_modules=["q_a_proj"]))
    )
    assert {(f.layer.rpartition(".")[2], f.rank, f.fan_in) for f in survey.factors} == {
        ("q_a_proj", 2, 16.0)
    }


# --- adapters that are no LoRA pair ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER_TUNERS)
def test_other_methods_of_peft_stay_at_the_base_rate(lora, name):
    """A method of PEFT that is no LoRA pair is named, has no factors, and trains at the rate given."""
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    if name not in {kind.value for kind in mapping}:
        pytest.skip(f"this PEFT has no {name}")
    torch.manual_seed(0)
    at_base_rate(other_tuner(name), OTHER_TUNERS[name][0])


@pytest.mark.parametrize("name", OTHER_MODULES)
def test_other_modules_of_lycoris_stay_at_the_base_rate(name):
    """LyCORIS's modules that are no LoRA pair are named, have no factors, and train at the rate given."""
    pytest.importorskip("lycoris")
    torch.manual_seed(0)
    at_base_rate(lycoris(name, lambda: nn.Linear(16, 16))(4, 8.0), OTHER_MODULES[name])


def at_base_rate(model, kind):
    survey = inspect_model(model)
    assert survey.factors == ()
    assert kind in {other_kind(name) for name in survey.other}
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3, tuned_at=AT_16)
    assert {g["lr"] for g in opt.param_groups} == {1e-3}
    assert sum(len(g["params"]) for g in opt.param_groups) == len(survey.other)
