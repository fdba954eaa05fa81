"""What others published on full finetuning: best learning rates, and the curves that show them.

The files are not in the repository. A script is given their folder, and reads the files of the hash that was read. `SOURCES`
says what each file holds and where it comes from.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
from laws.others import SOURCES as LORA_SOURCES
from laws.others import (
    Curve,
    Source,
    Sweep,
    Widths,
    curves_of,
    middle_of_flat,
    qwen_4b,
    qwen_7b,
    qwen_grpo,
    rows_of,
)
from study.grids import FULL
from study.loss_curves import vertex_of

from rankaware_optim import Reference

_METASMOOTHNESS = "github.com/EleutherAI/metasmoothness"
SOURCES = {
    **{
        name: LORA_SOURCES[name]
        for name in ("qwen2.5-7b.csv", "qwen3-4b.csv", "qwen3-1.7b-grpo.csv")
    },
    "best-rates.csv": Source(
        "6887432942e39807f55923c28d39776e44b63f443259f17f13bc2d5008a01a44",
        "Best learning rates without curves: nine models of Qwen3 and Llama (arXiv 2609.01244, by the notes of others), OLMo 2 "
        "(arXiv 2501.00656), Llama-3.1-8B (allenai/open-instruct, pull request 290), Qwen3-0.6B and 1.7B (Gefen-X, commit "
        "222a6536), SmolLM3-3B (Hugging Face's Smol Training Playbook).",
    ),
    "qwen2.5-1.5b-steps.csv": Source(
        "b058d7b54b594553226a44ba9f7403d083dbf056527fd0a3fa37a341fd64a5c8",
        "Loss of Qwen2.5-1.5B in full finetuning at 32 to 2,000 steps of batch 256, two epochs of ever more data, bfloat16, one "
        f"seed. {_METASMOOTHNESS}, commit a0096c6c (MIT).",
    ),
    "gpt2-steps-batch.csv": Source(
        "90dd69d3b14e2ebbb711fb585609e9ee16a7e83548a4aa4532f05ae430b4d235",
        "Loss of GPT-2 (124M) in full finetuning by steps, batch and epochs, float32, one seed: for exponents only. "
        f"{_METASMOOTHNESS}, commit 01bc60a5 (MIT).",
    ),
    "llama3.1-8b-grpo-gsm8k.csv": Source(
        "62a5627b1e5d737ccfd6a55c4de0569db7d538a47319ac205e682955a0c1aa9f",
        "Accuracy on GSM8K of Llama-3.1-8B after 150 updates of GRPO, alpha 32, ranks 1, 16 and 256 at eight rates and full "
        "finetuning at seven, one seed; float32 main weights are assumed. Sphere-AI-Lab/orbit, report E4, commit 46c8e0f6.",
    ),
    "qwen3-1.7b-grpo-full.csv": Source(
        "31b46936b3c0f4ac38f58918d0ff642e5653d1375fe496b288b9107c015f7acc",
        "Accuracy of Qwen3-1.7B after full GRPO in two set-ups. ymzhang0303/assignment5-alignment, commit c4a5a23f; "
        "olokevin/lora-without-regret, commit 3634e298.",
    ),
    "qwen2.5-1.5b-grpo-dtype.csv": Source(
        "c161453518fa1b2a98dfe285f7c9f5f5eb8ab70949e30b0be713c1d3a00cd3b2",
        "Full GRPO of Qwen2.5-1.5B-Instruct on GSM8K with bfloat16 and with float32 weights. areal-project/AReaL, commit "
        "909b29f3 and pull request 1634.",
    ),
}


def checked(folder: Path) -> Path:
    """The same folder, if it has all files that were read.

    Raises:
        click.ClickException: a file is missing or is another one.
    """
    for name, source in SOURCES.items():
        path = folder / name
        if not path.exists():
            raise click.ClickException(f"{path} is missing.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
            raise click.ClickException(f"{path} is not the file that was read.")
    return folder


# --- full supervised finetuning ---------------------------------------------------------------------------------------


class Best(NamedTuple):
    """A best learning rate of full supervised finetuning.

    Args:
        source: the group that published it.
        model: the model.
        x: log2 of the best learning rate.
        steps: optimizer steps of the run, None if unknown.
        inner: the model's largest fan-in.
        bfloat16: whether the weights themselves trained in bfloat16.
        how: how the best rate was read.
    """

    source: str
    model: str
    x: float
    steps: float | None
    inner: int
    bfloat16: bool
    how: str = "tried"


NINE = "arXiv 2609.01244"
# The largest fan-in of the nine models: Qwen3 of 0.6, 1.7, 4, 8, 14 and 32B, Llama of 1, 3 and 8B.
NINE_WIDTHS = (3072, 6144, 9728, 12288, 17408, 25600, 8192, 8192, 14336)
MIDDLE_OF_NINE = 9728
_INNER = {
    "OLMo-2-7B": 11008,
    "OLMo-2-13B": 13824,
    "OLMo-2-32B": 27648,
    "Llama-3.1-8B": 14336,
    "Qwen3-0.6B": 3072,
    "Qwen3-1.7B": 6144,
    "SmolLM3-3B": 11008,
}


def supervised(folder: Path) -> list[Best]:
    """Every best learning rate of full supervised finetuning, those without a number of steps too."""
    found = []
    for row in rows_of(folder / "best-rates.csv"):
        if row["method"] == "full" and row["task"] == "sft":
            source = row["source"].removesuffix(" README")
            inner = _INNER.get(row["model"], MIDDLE_OF_NINE)
            bfloat16 = row["dtype"] == "bf16"
            x = mean_of_log2(row["best_lr"])
            steps = mean_of_steps(row["steps"])
            found.append(Best(source, row["model"], x, steps, inner, bfloat16))
    seven = vertex_of(curves_of(rows_of(folder / "qwen2.5-7b.csv"), "loss")[FULL])
    assert seven is not None
    persona = Best("persona-system", "Qwen2.5-7B", seven, 784, 18944, True, "vertex")
    four = qwen_4b(folder / "qwen3-4b.csv").best["tried"][FULL]
    regret = Best("lora-without-regret", "Qwen3-4B", four, 200, 9728, True)
    return [*found, persona, regret, *of_lengths(folder)]


def of_lengths(folder: Path) -> list[Best]:
    """The best rates of Qwen2.5-1.5B, one for each number of steps."""
    curves: dict[int, dict[float, float]] = defaultdict(dict)
    for row in rows_of(folder / "qwen2.5-1.5b-steps.csv"):
        curves[int(row["steps"])][math.log2(float(row["lr"]))] = float(row["loss"])
    return [
        Best("metasmoothness", "Qwen2.5-1.5B", x, steps, 8960, True, "vertex")
        for steps, curve in curves.items()
        if (x := vertex_of(curve)) is not None
    ]


def mean_of_log2(text: str) -> float:
    """log2 of a rate in words, such as "3e-5" or "3e-6 or 1e-5": the mean of several."""
    rates = [float(word) for word in text.split() if word[0].isdigit()]
    return sum(map(math.log2, rates)) / len(rates)


def mean_of_steps(text: str) -> float | None:
    """The geometric mean of a range of steps such as "80-310", None if there is none."""
    ends = [float(each) for each in text.split("-") if each]
    return math.prod(ends) ** (1 / len(ends)) if ends else None


# --- LoRA and full finetuning of one model ----------------------------------------------------------------------------


class Pair(NamedTuple):
    """A source with best rates of LoRA and of full finetuning, log2.

    Args:
        name: the model and the group.
        lora: the best rates, by configuration.
        full: full finetuning as a law sees it.
        best: its best rate.
        bfloat16: whether the weights themselves trained in bfloat16.
    """

    name: str
    lora: Mapping[Reference, float]
    full: Reference
    best: float
    bfloat16: bool


QWEN_4B = Widths(2560, 4096, 1024, 9728)


def pairs(folder: Path) -> list[Pair]:
    """The five sources that have both."""
    nine = {
        row["method"]: math.log2(float(row["best_lr"]))
        for row in rows_of(folder / "best-rates.csv")
        if row["source"] == NINE
    }
    of_nine = Pair(
        f"nine models, supervised ({NINE})",
        {Reference(64, 32, fan_in=QWEN_4B.mean): nine["lora"]},
        Reference(method="full", fan_in=MIDDLE_OF_NINE),
        nine["full"],
        False,
    )
    return [
        pair_of("Qwen2.5-7B, supervised", qwen_7b(folder / "qwen2.5-7b.csv"), True),
        pair_of("Qwen3-4B, supervised", qwen_4b(folder / "qwen3-4b.csv"), True),
        of_nine,
        pair_of("Qwen3-1.7B, GRPO", qwen_grpo(folder / "qwen3-1.7b-grpo.csv"), True),
        pair_of("Llama-3.1-8B, GRPO", llama_grpo(folder), False),
    ]


def pair_of(name: str, sweep: Sweep, bfloat16: bool) -> Pair:
    best = sweep.best["vertex"] or sweep.best["tried"]
    lora = {sweep.at(rank): x for rank, x in best.items() if rank != FULL}
    return Pair(name, lora, sweep.at(FULL), best[FULL], bfloat16)


@cache
def llama_grpo(folder: Path) -> Sweep:
    """Llama-3.1-8B in GRPO, by minus its accuracy in percent."""
    accuracy = curves_of(
        rows_of(folder / "llama3.1-8b-grpo-gsm8k.csv"), "accuracy_final"
    )
    curves = {
        rank: {x: -100 * value for x, value in each.items()}
        for rank, each in accuracy.items()
    }
    flat = {rank: middle_of_flat(each) for rank, each in curves.items()}
    tried = {rank: min(each, key=each.__getitem__) for rank, each in curves.items()}
    best = {
        "tried": tried,
        "vertex": {rank: x for rank, x in flat.items() if x is not None},
    }
    widths = Widths(4096, 4096, 1024, 14336)
    return Sweep("Llama-3.1-8B", widths, lambda rank: 32.0, "points", curves, best)


# --- full finetuning in reinforcement learning ------------------------------------------------------------------------


def of_rl(folder: Path) -> dict[str, Curve]:
    """Accuracy lost beside the best rate of each source, points, by log2 of the rate."""
    curves = {
        "Qwen3-1.7B (lora-without-regret)": qwen_grpo(
            folder / "qwen3-1.7b-grpo.csv"
        ).curves[FULL],
        "Llama-3.1-8B (orbit)": llama_grpo(folder).curves[FULL],
    }
    other: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(folder / "qwen3-1.7b-grpo-full.csv"):
        name = f"Qwen3-1.7B ({row['source']})"
        other[name][math.log2(float(row["lr"]))].append(float(row["accuracy_final"]))
    for row in rows_of(folder / "qwen2.5-1.5b-grpo-dtype.csv"):
        if row["measure"] == "max_eval_reward" and row["dtype"] == "bfloat16":
            name = "Qwen2.5-1.5B (AReaL, bfloat16)"
            other[name][math.log2(float(row["lr"]))].append(float(row["value"]))
    for name, values in other.items():
        curves[name] = {
            x: -100 * sum(each) / len(each) for x, each in sorted(values.items())
        }
    return {
        name: {x: y - min(curve.values()) for x, y in sorted(curve.items())}
        for name, curve in curves.items()
    }
