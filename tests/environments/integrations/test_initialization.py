"""Initialisation of the libraries' own layers: the output keeps every bit, and what they save says the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankaware_optim import InspectionError, inspect_model
from rankaware_optim.inspection import initialize

from ...helpers.llama import llama_config
from ...helpers.models import same, snapshot
from ...helpers.oracle import check_initialize, output_of
from ...helpers.real_adapters import CASES, Attention, Case, Experts

# Libraries warn of what these tests do on purpose: tied or grouped layers, deprecated ones, rslora with a pattern.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]
RANK, ALPHA = 4, 12
HERE = [case for case in CASES if case.package not in ("torchtune", "litgpt")]
PLAIN = [case for case in HERE if case.init in "AB"]
OTHERS = [case for case in HERE if case.init == "other"]


def built(case: Case) -> nn.Module:
    if not case.installed():
        pytest.skip(f"{case.package} is not installed")
    torch.manual_seed(0)
    return case.make(RANK, ALPHA)


def steps(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], lr: float = 1e-2, count: int = 3
) -> None:
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(count):
        (output_of(model, *inputs) - 1).square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_library_s_layer(case, init):
    """The output keeps every bit, the survey gives the init, and training keeps the init known."""
    survey = check_initialize(built(case), case.inputs(), init)
    fans = tuple((f.fan_in, f.fan_out) for f in survey.factors if f.role == "A")
    assert fans == case.fans


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_a_library_s_own_init_is_refused(case):
    """What starts with both factors drawn, or needs its own init, is refused and stays as it is."""
    model = built(case)
    before = snapshot(model)
    with pytest.raises(
        InspectionError,
        match=r"needs the init of its convention|both factors drawn|`scalar` of zero",
    ):
        initialize(model, "B")
    assert same(before, snapshot(model))


# --- PEFT -----------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Two blocks of two linear layers, stacked experts and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(30, 12)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(12, 12), "v": nn.Linear(12, 12)})
            for _ in range(2)
        )
        self.experts, self.mix = Experts(False, ("up", "down")), Attention()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = x + block["v"](block["q"](x).tanh())
        return self.experts(self.mix(x))


TOKENS = (torch.randint(30, (3, 5), generator=torch.Generator().manual_seed(2)),)
TARGETS = {
    "target_modules": ["q", "v", "emb", "attn"],
    "target_parameters": ["experts.up", "experts.down"],
}


def peft_model(**options) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        Deep(),
        peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **TARGETS, **options}),
    )


def test_another_adapter_is_left_alone():
    """An inactive adapter keeps factors, multiplier and configuration, and starts where it was."""
    import peft

    model = peft_model()
    model.add_adapter("wide", peft.LoraConfig(r=8, lora_alpha=4, **TARGETS))
    config, before = str(model.peft_config["wide"]), snapshot(model)
    initialize(model, "B")
    after = snapshot(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert not any("wide" in name for name in moved)
    assert str(model.peft_config["wide"]) == config
    model.set_adapter("wide")
    inits = {
        (f.init, f.scaling)
        for f in inspect_model(model).factors
        if f.kind != "embedding"
    }
    assert inits == {("A", 0.5)}


def test_mica_trains_a_alone_and_starts_at_init_b_only():
    """MiCA freezes B, so Init[A], whose B is zero, is refused, and Init[B] draws B."""
    options = {"target_modules": ["q"], "target_parameters": None}
    model = peft_model(init_lora_weights="mica", **options)
    with pytest.raises(
        InspectionError, match=r"^lora_B.default.weight of .* is frozen"
    ):
        initialize(model, "A")
    before = output_of(model, *TOKENS).clone()
    initialize(model, "B")
    assert torch.equal(before, output_of(model, *TOKENS))


def test_merged_adapters():
    """A merged adapter that adds something is refused; one that adds nothing is initialised."""
    options = {"target_modules": ["q", "v"], "target_parameters": None}
    model = peft_model(**options)
    model.merge_adapter()
    before = output_of(model, *TOKENS).clone()
    initialize(model, "B")
    model.unmerge_adapter()
    assert torch.equal(before, output_of(model, *TOKENS))
    steps(model, TOKENS)
    model.merge_adapter()
    with pytest.raises(InspectionError, match=r"was trained already"):
        initialize(model, "B")


def test_an_embedding_tied_to_the_head_is_refused():
    """PEFT's tied pair holds one memory in opposite roles, which no one init can start."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM(
        llama_config(
            hidden_size=12, intermediate_size=8, vocab_size=30, tie_word_embeddings=True
        )
    )
    names = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=names, ensure_weight_tying=True)
    model = peft.get_peft_model(base, config)
    with pytest.raises(InspectionError, match="is tied to a factor that must be drawn"):
        initialize(model, "B")
