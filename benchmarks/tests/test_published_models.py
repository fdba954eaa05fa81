"""Tests of the sweep of 35 published models: how its file is read, and how learning rates are scored on it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from internals import PUBLISHED
from laws import learning_rate_matters, tinker
from laws.suggested import suggested
from study.grids import FULL

import rankaware_optim as ra

PAGE = """# SFT Sweep Results

- `3e-04`: best for 14 model(s)

## Qwen/Qwen3-8B

- Model: `Qwen/Qwen3-8B`
- Learning rates: [4e-05, 1e-04]

| LR | LoRA Rank | Test NLL | Train NLL | Wall Time (min) |
|---:|----------:|---------:|----------:|----------------:|
| 4e-05 | 4 | 0.6000 | 0.7000 | 67 |
| 4e-05 | 4 | 0.8000 | 0.7000 | 67 |
| 1e-04 | 4 | 0.5000 | 0.6000 | 50 |

## Qwen/Qwen3-32B

- Model: `Qwen/Qwen3-32B`

| LR | LoRA Rank | Test NLL | Train NLL | Wall Time (min) |
|---:|----------:|---------:|----------:|----------------:|
| 1e-03 | 64 | 0.4500 | 0.6000 | 50 |
"""


def test_a_page_is_read_by_model(tmp_path: Path) -> None:
    """Every row of the file is a run of the model in the heading above it. Repeated runs are averaged."""
    path = tmp_path / "sft_sweep.md"
    path.write_text(PAGE)
    curves = tinker.curves(path)
    assert curves["Qwen/Qwen3-8B", 4] == pytest.approx(
        {math.log2(4e-5): 0.7, math.log2(1e-4): 0.5}
    )
    assert curves["Qwen/Qwen3-32B", 64] == pytest.approx({math.log2(1e-3): 0.45})
    assert {run["model"] for run in tinker.added(path)} == {"Qwen/Qwen3-8B"}


def test_a_rate_is_scored_on_the_curves_whose_best_lies_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only curves whose best learning rate lies inside the grid score a learning rate and its interval."""
    name = "meta-llama/Llama-3.2-1B"
    parabola = {float(x): 2.0 + (x + 12) ** 2 / 10 for x in range(-15, -8)}
    curves = {
        (name, 16): parabola,
        (name, 64): {x: -x for x in parabola},  # the lowest loss is at an end
        (name, 1): {-12.0: 2.0},
    }
    monkeypatch.setattr(tinker, "curves", lambda path: curves)
    (target,) = targets = tinker.targets(Path())
    assert target.best == pytest.approx(-12.0)
    assert target.at == ra.Reference(16, PUBLISHED.alpha, fan_in=2048.0)
    high = tinker.score_of(targets, [ra.Rate(2.0**-11, low=2.0**-11.5, high=1.0)])
    assert high == pytest.approx((5.0, 1.0, 0.0))
    sure = tinker.score_of(targets, [ra.Rate(2.0**-12, low=2.0**-13, high=1.0)])
    assert sure == pytest.approx((0.0, 0.0, 1.0))


def test_a_law_is_judged_by_the_best_rates_that_are_quoted() -> None:
    """A single learning rate for all ranks errs by the octaves between the best ones that the source quotes."""
    errors = learning_rate_matters.errors_of(learning_rate_matters.LAWS["kept"])
    assert len(errors) == 42
    assert max(map(abs, errors)) == pytest.approx(math.log2(5.62), abs=0.01)
    assert math.fsum(errors) == pytest.approx(0.0)


def test_a_tasks_suggestion_is_that_of_its_width() -> None:
    """A task's suggestion uses its most common fan-in for LoRA, and its largest fan-in for full finetuning."""
    lora = ra.suggest_lr(ra.Reference(16, 16, fan_in=192))
    assert suggested("language", "Init[A], s = 1", 16) == math.log2(lora.lr)
    full = ra.suggest_lr(ra.Reference(method="full", fan_in=512))
    assert suggested("language", "full", FULL) == math.log2(full.lr)
