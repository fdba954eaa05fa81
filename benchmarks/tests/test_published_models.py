"""The sweep of 35 published models: what is read from its file, and what taking a rate to another model costs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from laws import another_model, learning_rate_matters, tinker
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
    """A row is a run of the model named above it, with its test loss. Repeated runs are averaged."""
    path = tmp_path / "sft_sweep.md"
    path.write_text(PAGE)
    curves = tinker.curves(path)
    assert curves["Qwen/Qwen3-8B", 4] == pytest.approx(
        {math.log2(4e-5): 0.7, math.log2(1e-4): 0.5}
    )
    assert curves["Qwen/Qwen3-32B", 64] == pytest.approx({math.log2(1e-3): 0.45})
    assert {run["model"] for run in tinker.added(path)} == {"Qwen/Qwen3-8B"}


def test_models_have_a_width_and_a_size() -> None:
    """35 models have a width, and their names or ours say how many parameters they have."""
    assert (len(tinker.FIRST), len(tinker.HIDDEN)) == (18, 35)
    sizes = {name: tinker.parameters(name) for name in tinker.HIDDEN}
    assert sizes["meta-llama/Llama-3.2-1B"] == 1.0
    assert sizes["Qwen/Qwen3.5-35B-A3B"] == 35.0
    assert sizes["moonshotai/Kimi-K2.5"] == 1000.0


def test_a_kept_rate_is_off_by_what_two_models_differ() -> None:
    """Only models of one rank are compared, each with the other, and a rule moves the rate before."""
    small, large = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.3-70B-Instruct"
    found = {(small, 4): -10.0, (large, 4): -12.0, (small, 16): -9.0}
    curves = {
        cell: {best + step: 1.0 + step**2 for step in (-4.0, -2.0, 0.0, 2.0, 4.0)}
        for cell, best in found.items()
    }
    errors, lost = another_model.moved(found, curves, another_model.kept)
    assert sorted(errors) == [-2.0, 2.0]
    assert lost == [4.0, 4.0]
    errors, _ = another_model.moved(found, curves, another_model.by_family)
    assert sorted(errors) == pytest.approx([2 * 0.781 - 2, 2 - 2 * 0.781])


def test_spreads_are_between_models_and_within() -> None:
    """Two models an octave apart spread by that, and each over its ranks by its own standard deviation."""
    groups = [[0.0, 1.0], [1.0, 2.0]]
    assert another_model.between_models(groups) == pytest.approx(math.sqrt(0.5))
    assert another_model.within_models(groups) == pytest.approx(math.sqrt(0.5))


def test_a_law_is_judged_by_the_best_rates_that_are_quoted() -> None:
    """One rate for all is off by as many steps of the grid as two ranks differ."""
    errors = learning_rate_matters.errors_of(learning_rate_matters.LAWS["kept"])
    assert len(errors) == 42
    assert max(map(abs, errors)) == pytest.approx(math.log2(5.62), abs=0.01)
    assert math.fsum(errors) == pytest.approx(0.0)


def test_a_tasks_suggestion_is_that_of_its_width() -> None:
    """A task is asked for at its most common fan-in, full finetuning at its largest one."""
    lora = ra.suggest_lr(ra.Reference(16, 16, fan_in=192))
    assert suggested("language", "Init[A], s = 1", 16) == math.log2(lora.lr)
    full = ra.suggest_lr(ra.Reference(method="full", fan_in=512))
    assert suggested("language", "full", FULL) == math.log2(full.lr)
