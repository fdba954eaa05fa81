"""`convert_lr(model=...)`: the widths are read off a configuration as the optimizer reads them off the model."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim.cli import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

# of packages that these libraries import, and of PEFT on Conv1D
pytestmark = pytest.mark.filterwarnings("ignore")

# What these models' config.json files say of their shapes.
LLAMA_3_1_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "vocab_size": 32768,
}
QWEN2_5_0_5B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "vocab_size": 50257,
}
T5_BASE = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 32128,
}
BERT_BASE = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30522,
}
SD_1_5_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
DIT_XL = {
    "_class_name": "DiTTransformer2DModel",
    "attention_head_dim": 72,
    "in_channels": 4,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}
MODELS = [
    pytest.param(LLAMA_3_1_8B, ["q_proj", "v_proj", "down_proj"], id="llama"),
    pytest.param(MISTRAL_7B, ["q_proj", "k_proj", "v_proj", "o_proj"], id="mistral"),
    pytest.param(QWEN2_5_0_5B, "all-linear", id="qwen2"),
    pytest.param(GPT2, ["c_attn", "c_proj"], id="gpt2"),
    pytest.param(T5_BASE, ["q", "v", "wo"], id="t5"),
    pytest.param(BERT_BASE, ["query", "dense", "word_embeddings"], id="bert"),
    pytest.param(SD_1_5_UNET, ["to_q", "to_k", "to_out.0", "conv1"], id="unet"),
    pytest.param(DIT_XL, ["to_q", "to_v", "ff.net.2"], id="dit"),
]
MOVES = [
    ("r=16,alpha=32", "r=64,alpha=128"),
    ("r=16,alpha=32", "r=64,alpha=32"),
    ("r=8,alpha=16,fan_in=1024", "r=8,alpha=16"),
    ("full", "r=32,alpha=64"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Let no socket connect."""

    def refuse(*_):
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def folder(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def built(config, *, head):
    """The real model on the meta device, as a script builds it."""
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    own = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    architecture = getattr(transformers, config["architectures"][0])
    return architecture(own) if head else transformers.AutoModel.from_config(own)


def multiplier(model, tuned_at, **settings):
    """The one factor by which the optimizer moves the rates of a model's dense layers."""
    opt = ra.RankAwareOptimizer(
        model, torch.optim.AdamW, lr=1.0, tuned_at=tuned_at, **settings
    )
    names = {f.name for f in opt.report().survey.factors if f.kind != "embedding"}
    (number,) = {
        group["rank_multiplier"]
        for group in opt.param_groups
        if names & set(group["param_names"])
    }
    return number


@pytest.mark.parametrize(("config", "modules"), MODELS)
def test_the_converted_rate_is_the_optimizers(tmp_path, config, modules):
    """At each move, a rate converted for the configuration is to the last bit the one that the optimizer trains at."""
    for tuned_at, to in MOVES:
        at = dict(part.split("=") for part in to.split(","))
        adapters = peft.LoraConfig(
            r=int(at["r"]), lora_alpha=int(at["alpha"]), target_modules=modules
        )
        with torch.device("meta"):
            model = peft.get_peft_model(built(config, head=False), adapters)
        converted = ra.convert_lr(
            1.0,
            from_=tuned_at,
            to=to,
            model=folder(tmp_path, config),
            target_modules=modules,
        )
        assert converted.lr == multiplier(model, tuned_at), (tuned_at, to)


@pytest.mark.parametrize(("config", "modules"), MODELS)
@pytest.mark.parametrize("tuned_at", ["r=16,alpha=32", "r=16,alpha=32,init=B"])
def test_so_is_the_one_for_full_finetuning(tmp_path, config, modules, tuned_at):
    """A LoRA rate converted to full finetuning of the architecture is the one that the optimizer trains at."""
    with torch.device("meta"):
        model = built(config, head=True)
    file = folder(tmp_path, config) / "config.json"
    converted = ra.convert_lr(1.0, from_=tuned_at, to="full", model=file)
    assert converted.lr == multiplier(model, tuned_at, method="full")


def test_the_command_prints_it(tmp_path):
    """The command's number and note are those of the function, also among a trainer's lines, whose reference has no
    width, since the plug-in reads it."""
    config = folder(tmp_path, QWEN2_5_0_5B)
    words = ["--from", "r=16,alpha=32", "--to", "r=64", "--model", str(config)]
    words += ["--target-modules", "q_proj, down_proj"]
    converted = ra.convert_lr(
        2e-4,
        from_="r=16,alpha=32",
        to="r=64",
        model=config,
        target_modules=["q_proj", "down_proj"],
    )
    done = CliRunner().invoke(main, ["convert", "2e-4", *words, "--json"])
    (document,) = json.loads(done.stdout)
    assert document["lr"] == converted.lr
    assert document["notes"] == list(converted.notes)
    note = f"Read off {config}: mean fan-in 4246.76, largest 4864, of 48 layers that train."
    assert document["notes"][0] == note
    lines = CliRunner().invoke(main, ["convert", "2e-4", *words, "--as", "axolotl"])
    assert f"# {note}\n" in lines.stdout
    assert 'tuned_at: "r=16,alpha=32"' in lines.stdout


# An attention kernel may be code on the Hub.
BESIDE = [
    {"attn_implementation": "someone/kernel", "_experts_implementation": "x/y"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
]


def test_kernels_and_quantization_are_left_out(tmp_path):
    """What a configuration says of kernels and of quantized weights moves no rate, and is not loaded."""
    moved = {
        ra.convert_lr(
            1.0,
            from_="r=16,alpha=32",
            to="r=64",
            model=folder(tmp_path, {**GPT2, **more}),
            target_modules=["c_attn"],
        ).lr
        for more in ({}, *BESIDE)
    }
    assert len(moved) == 1


@pytest.mark.parametrize(
    ("config", "modules", "message"),
    [
        (
            GPT2,
            ["q_proj"],
            r"PEFT cannot adapt this model: Target modules {'q_proj'} not found in the base model\."
            r" Give names of its layers: c_attn, c_fc, c_proj, wpe, wte\.$",
        ),
        ({"model_type": "own"}, ["q"], "transformers has no model of type 'own'"),
        ({}, ["q"], "transformers has no model of type 'None'"),
        ({"_class_name": "Own"}, ["q"], "diffusers has no model 'Own'"),
        ({"_class_name": "DiffusionPipeline"}, ["q"], "diffusers has no model"),
        (
            {**GPT2, "n_embd": "wide"},
            ["c_attn"],
            "describes no model that can be built",
        ),
        (
            {
                **GPT2,
                "architectures": ["pipeline", "no", "GPT2LMHeadModel"],
                "n_head": 0,
            },
            ["c_attn"],
            "describes no model that can be built",
        ),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path, config, modules, message):
    """A configuration that describes no model here, and names of no layer, are refused in a sentence."""
    with pytest.raises(ra.InspectionError, match=message):
        ra.convert_lr(
            1.0,
            from_="r=16,alpha=32",
            to="r=64",
            model=folder(tmp_path, config),
            target_modules=modules,
        )
