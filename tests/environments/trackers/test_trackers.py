"""Real trackers, read back: rates by group, and the recipe, through Trainer's callback and Lightning's logger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankaware_optim import RankAwareOptimizer, RankAwareWarning, Recipe

from ...helpers.models import mlp
from ...helpers.recipes import RECIPE
from .wandb_file import read_run

for name in ("tensorboard", "wandb", "mlflow", "transformers", "peft", "lightning"):
    if not any(Path(entry, name).is_dir() for entry in sys.path if entry):
        pytest.skip(f"{name} is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[3]
STEPS = 3
RATES = [
    "base_lr/A/r4",
    "base_lr/B/r4",
    "lr/A/r4",
    "lr/B/r4",
    "rank_multiplier/A/r4",
    "rank_multiplier/B/r4",
]
HASH, NAME = RECIPE.tag.split(" ", 1)
LOGGED = {"rankaware/recipe": NAME, "rankaware/recipe_hash": HASH}


def tensorboard(folder: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """The texts and hyperparameters, and the scalars, of every event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import (
        parse_session_start_info_plugin_data,
    )

    words, scalars = {}, {}
    for path in folder.rglob("events.out.tfevents.*"):
        found = EventAccumulator(str(path), size_guidance={"tensors": 0, "scalars": 0})
        found.Reload()
        for tag in found.Tags()["tensors"]:
            words[tag.removesuffix("/text_summary")] = (
                found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
            )
        if "_hparams_/session_start_info" in found.summary_metadata:
            content = found.SummaryMetadata(
                "_hparams_/session_start_info"
            ).plugin_data.content
            hparams = parse_session_start_info_plugin_data(content).hparams
            words |= {key: value.string_value for key, value in hparams.items()}
        scalars |= {
            tag: [event.value for event in found.Scalars(tag)]
            for tag in found.Tags()["scalars"]
        }
    return words, scalars


def wandb(folder: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    config, history = read_run(folder)
    keys = dict.fromkeys(key for entry in history for key in entry)
    return config, {
        key: [entry[key] for entry in history if key in entry] for key in keys
    }


def mlflow(folder: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """The tags and parameters, and the metrics, of the one run in a local file store."""
    (run,) = (
        path.parent
        for path in folder.rglob("meta.yaml")
        if (path.parent / "metrics").is_dir()
    )
    words = {
        path.relative_to(run / kind).as_posix(): path.read_text(encoding="utf-8")
        for kind in ("tags", "params")
        for path in (run / kind).rglob("*")
        if path.is_file()
    }
    metrics = {
        path.relative_to(run / "metrics").as_posix(): [
            float(line.split()[1])
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in (run / "metrics").rglob("*")
        if path.is_file()
    }
    return words, metrics


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


@pytest.fixture
def run(tmp_path):
    """Runs a script of this folder in a separate process, in an empty folder, with no network to ask for."""

    def ran(script: str, *arguments: object) -> Path:
        own = {
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "WANDB_DIR": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
        }
        own |= {
            "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
            "MLFLOW_ALLOW_FILE_STORE": "true",
        }
        own |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            f"tests.environments.trackers.{script}",
        ]
        ended = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )
        assert not ended.returncode, ended.stderr[-3000:]
        return tmp_path

    return ran


def check(
    words: dict[str, str],
    metrics: dict[str, list[float]],
    prefix: str,
    logged: dict[str, str],
) -> None:
    """Every group's rates at every step, in the ratio that the multiplier says, and the recipe or none."""
    assert {f"{prefix}{name}" for name in RATES} <= set(metrics)
    for half in "AB":
        base, by, lr = (
            metrics[f"{prefix}{name}/{half}/r4"]
            for name in ("base_lr", "rank_multiplier", "lr")
        )
        assert len(base) == STEPS
        assert lr == pytest.approx([b * m for b, m in zip(base, by, strict=True)])
        assert base == sorted(base, reverse=True)
        assert base[0] > base[-1]  # the schedule's
    assert {key: words[key] for key in LOGGED if key in words} == logged


@pytest.mark.parametrize("tracker", READERS)
def test_trainer_tells_the_trackers(tracker, run):
    """With log_rates(trainer) a tracker has every group's rates, and the recipe's name and hash."""
    prefix = "" if tracker == "mlflow" else "train/"  # Trainer's own
    check(*READERS[tracker](run("trainer", tracker, "recipe")), prefix, LOGGED)


@pytest.mark.parametrize("tracker", READERS)
def test_lightning_tells_the_trackers(tracker, run):
    """With lightning_rates() a tracker has every group's rates, and the recipe's name and hash."""
    check(*READERS[tracker](run("lit", tracker)), "", LOGGED)


def test_without_a_recipe_none_is_named(run):
    """A run at a typed rate has its groups' rates in the tracker, and no recipe in its checkpoint."""
    folder = run("trainer", "tensorboard", "none")
    check(*tensorboard(folder), "train/", {})
    assert not list(folder.rglob("recipe.toml"))


def test_trainer_saves_the_recipe_beside_every_checkpoint(run):
    """Every checkpoint of Trainer holds its recipe, and PEFT still loads the adapter from there."""
    folder = run("trainer", "tensorboard", "recipe") / "out"
    made = sorted(folder.glob("checkpoint-*"))
    assert [path.name for path in made] == ["checkpoint-2", "checkpoint-3"]
    for path in made:
        assert Recipe.load(path).tag == RECIPE.tag
        assert "## Learning rate" in (path / "README.md").read_text(encoding="utf-8")
        assert (path / "loaded").is_file()  # written by the script, which loaded it


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_that_cannot_be_saved_ends_no_run(tmp_path):
    """Where a checkpoint's README cannot be read, a warning says so and training goes on."""
    from accelerate import Accelerator
    from transformers import TrainerState, TrainingArguments

    from rankaware_optim.integrations import log_rates

    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "README.md").write_bytes(b"\xff\xfe")
    args, state = TrainingArguments(tmp_path), TrainerState(global_step=1)
    opt = RankAwareOptimizer(mlp(width=64), "adamw", recipe=RECIPE, other_lr=1e-3)
    wrapped = Accelerator(cpu=True).prepare_optimizer(opt)
    with pytest.warns(RankAwareWarning, match=r"README\.md cannot be written"):
        log_rates().on_save(args, state, None, optimizer=wrapped)
