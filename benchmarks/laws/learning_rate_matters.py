"""This section compares the results of the paper *Learning Rate Matters* (arXiv 2602.04998v2) with our
predictions. Other people ran these sweeps with alpha = rank, on models with 0.6 and 1 billion parameters.

The paper's repository, github.com/yuang-lee/lr-matters-lora, commit a1d8a568, shows the accuracy of vanilla
LoRA on mathematical reasoning by rank and learning rate. The runs trained Gemma-3-1B on 100,000 examples of
MetaMathQA with a batch size of 64, AdamW without weight decay, a cosine schedule and three seeds. The scripts
of the repository (`run-lora/scripts/train.sh`) set alpha = rank. The numbers are only available in pictures.
We only quote best learning rates, from `gemma_lr_rank.png` (by rank, sha256 5c4568ce0a54accb),
`gemma_math_r128_bs_lr.png` (by batch size, 77522632414639f7) and `gemma_lr_train_number.png` (by number of
examples, 27cc46963c166f83) in `practical-heuristics/assets/`, and from `assets/qwen-math-r128-bs64.png`
(variants on Qwen3-0.6B, 6c7c667cd360dec9). The learning rates are a factor of 1.78 apart, so a best learning
rate is known to ± 0.42 octaves.

We wrote the following rule before we applied any law. Every law converts the best learning rate of each of
the seven ranks to the six other ranks. The law with the smallest root mean square of the errors is the best.
Because of the grid, two best learning rates can be off by up to 0.83 octaves together, so an error of this
size can come from the grid alone.
"""

from __future__ import annotations

import itertools
import math
import statistics

from internals import get_optimizer_class
from recording import block, number

from rankaware_optim import Constant, Falling, Law, MuA, Power, Reference
from rankaware_optim.laws import (
    checked_batch_multiplier,
    checked_multiplier,
)
from rankaware_optim.transfer import suggest_lr

STEP = math.log2(10) / 4  # octaves between the rates of their grid
GEMMA, QWEN = 1152, 1024  # hidden sizes
# The best rate of each rank at alpha = rank, in steps of the grid from 2e-4.
BY_RANK = {4: 4, 8: 4, 16: 4, 32: 3, 64: 2, 128: 2, 256: 1}
# The best rate of rank 128 by batch and variant, in steps of the grid from 1.1e-4.
BY_BATCH = {
    "LoRA": {16: 1, 64: 3, 128: 4},
    "DoRA": {16: 2, 64: 3, 128: 4},
    "Init[AB]": {16: 2, 64: 3, 128: 4},
    "PiSSA": {16: 0, 64: 1, 128: 2},
}
# Steps of the grid below LoRA's best rate, on Qwen3-0.6B at rank 128 and batch 64. LoRA's is 2e-4.
ON_QWEN = {"DoRA": 1, "Init[AB]": 1, "PiSSA": 4, "OLoRA": 5, "LoRA-GA": 5}
LAWS: dict[str, Law] = {
    "the default law": Falling(),
    "µA of 8 tokens (of `suggest_lr`)": MuA(tokens=8.0),
    "the paper's law": MuA(tokens=None),
    "1/√rank": Power(-0.5, law=Constant()),
    "1/rank": Power(-1.0, law=Constant()),
    "kept": Constant(),
}


def tables() -> str:
    """The laws on the sweep of ranks, every ratio beside ours, and the suggestions for their models."""
    return "\n\n".join([by_law(), ratios(), suggestions()])


# --- ranks ------------------------------------------------------------------------------------------------------------


def by_law() -> str:
    """The errors of every law over all ordered pairs of ranks."""
    rows = []
    for name, law in LAWS.items():
        errors = errors_of(law)
        fall = -octaves(law, min(BY_RANK), max(BY_RANK))
        rows.append(
            [
                name,
                number(statistics.median(map(abs, errors))),
                number(math.sqrt(statistics.fmean(e * e for e in errors))),
                number(max(map(abs, errors))),
                f"÷ {2**fall:.2g}",
            ]
        )
    heads = ["law", "median, octaves", "rms", "worst", "rank 4 to 256 (theirs ÷ 5.6)"]
    return block("Gemma-3-1B, alpha = rank: 42 moves between seven ranks", heads, rows)


def errors_of(law: Law) -> list[float]:
    """Octaves of the moved rate above the best one, over all ordered pairs of ranks."""
    return [
        octaves(law, a, b) - STEP * (BY_RANK[b] - BY_RANK[a])
        for a, b in itertools.permutations(BY_RANK, 2)
    ]


def octaves(law: Law, source: int, target: int) -> float:
    """By how much a law moves a rate from rank to rank, with alpha = rank, in Gemma-3-1B."""
    bound = law.bind(get_optimizer_class("AdamW"), {})
    at = Reference(source, source, fan_in=GEMMA)
    there = Reference(target, target, fan_in=GEMMA)
    return math.log2(checked_multiplier(bound, there.as_factor(), at))


# --- ratios -----------------------------------------------------------------------------------------------------------


def ratios() -> str:
    """What multiplies a best rate there, and by us."""
    plain = suggest_lr(Reference(128, 128, fan_in=QWEN))
    rows = [
        ["rank 4 → 256, alpha = rank", "÷ 5.6", times(octaves(Falling(), 4, 256))],
        *(
            [name, on_gemma(name, ON_QWEN[name]), of_variant(plain.lr, **options)]
            for name, options in {
                "PiSSA": {"init": "pissa"},
                "OLoRA": {"init": "olora"},
                "LoRA-GA": {"init": "lora_ga"},
                "DoRA": {"dora": True},
            }.items()
        ),
        ["Init[AB]", on_gemma("Init[AB]", 1), "no rate: neither factor starts at zero"],
        *(
            [f"batch {a} → {b}", by_batch(a, b), of_batch(b / a)]
            for a, b in ((16, 64), (64, 128), (16, 128))
        ),
        ["5,000 → 395,000 examples", "÷ 3.1", "× 1: the rate stays, its band grows"],
    ]
    return block("What multiplies the best rate", ["change", "theirs", "ours"], rows)


def on_gemma(name: str, below: int) -> str:
    """A variant's factor on Qwen3-0.6B, then on Gemma-3-1B at each batch where it is shown."""
    words = in_steps(-below)
    if name not in BY_BATCH:
        return words
    factors = [in_steps(BY_BATCH[name][b] - at) for b, at in BY_BATCH["LoRA"].items()]
    return f"{words}; on Gemma {', '.join(factors)}"


def by_batch(a: int, b: int) -> str:
    """The factor of every variant from one batch to another."""
    return ", ".join(
        f"{name} {in_steps(best[b] - best[a])}" for name, best in BY_BATCH.items()
    )


def of_variant(plain: float, **options: object) -> str:
    found = suggest_lr(Reference(128, 128, fan_in=QWEN), **options)
    return times(math.log2(found.lr / plain))


def of_batch(ratio: float) -> str:
    return times(math.log2(checked_batch_multiplier(Falling(), ratio)))


def in_steps(steps: int) -> str:
    """A factor of some steps of their grid."""
    return times(STEP * steps)


def times(octaves: float) -> str:
    """A factor in words."""
    sign = "÷" if octaves < -0.01 else "×"
    return f"{sign} {2 ** abs(octaves):.2g}"


# --- suggestions ------------------------------------------------------------------------------------------------------


def suggestions() -> str:
    """The suggestion for each of their best rates of plain LoRA, and whether its band holds it."""
    best = {
        ("Gemma-3-1B", GEMMA, rank): math.log2(2e-4) + STEP * steps
        for rank, steps in BY_RANK.items()
    }
    best["Qwen3-0.6B", QWEN, 128] = math.log2(2e-4)
    rows = []
    for (model, width, rank), x in best.items():
        found = suggest_lr(Reference(rank, rank, fan_in=width))
        rows.append(
            [
                model,
                f"{rank}",
                f"{2**x:.1e}",
                f"{found.lr:.1e}",
                f"{found.low:.1e} to {found.high:.1e}",
                "yes" if found.low <= 2**x <= found.high else "no",
            ]
        )
    heads = ["model", "rank = alpha", "best rate", "suggested", "90 % band", "holds it"]
    return block("Suggestions for their models, of another task", heads, rows)
