"""Axolotl itself: its command trains examples/axolotl.yaml, and its schema checks our settings."""

from __future__ import annotations

import pytest
import yaml

from rankaware_optim import OptimizerError

from ...helpers.examples import EXAMPLES, run, tiny

pytest.importorskip("axolotl")

QUIET = {"AXOLOTL_DO_NOT_TRACK": "1"}


def test_axolotls_command_trains_the_example(tmp_path):
    """`axolotl train` loads the plug-in by one YAML line, prints its report once and logs rates that it moved."""
    tiny(tmp_path)
    out = run(
        tmp_path,
        "axolotl",
        "train",
        str(EXAMPLES / "axolotl.yaml"),
        "--launcher",
        "python",
        **QUIET,
    )
    assert out.count("RankAwareOptimizer(AdamW)") == 1
    assert "rank_multiplier/A/r64" in out
    assert (tmp_path / "axolotl-out" / "adapter_model.safetensors").is_file()


def test_axolotls_command_has_ours():
    """`axolotl rankaware` is our command line, by the entry point group axolotl.cli_commands."""
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    done = CliRunner().invoke(
        cli,
        [
            "rankaware",
            "convert",
            "2e-4",
            "--from",
            "r=16,alpha=32",
            "--to",
            "r=16,alpha=16",
        ],
    )
    assert "Two rates: 0.0002 for A, 0.0004 for B (exact)." in done.output


def test_axolotls_factory_call_is_answered():
    """A factory takes the model with Axolotl's arguments after it, whose weight decay holds."""
    import torch
    from axolotl.core.training_args import AxolotlTrainingArguments

    from rankaware_optim.integrations import trainer_factory

    from ...helpers.models import mlp

    model = mlp((4,), head=False)
    factory, kwargs = trainer_factory(torch.optim.AdamW, lr=1e-3)
    args = AxolotlTrainingArguments(
        "runs", weight_decay=0.25, use_cpu=True, report_to="none"
    )
    assert {
        g["weight_decay"] for g in factory()(model, args, **kwargs).param_groups
    } == {0.25}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tunedat": "r=16,alpha=32"}, "tunedat"),
        ({"tuned_at": "rank 16"}, "not a part of a reference"),
        ({"tuned_at": "r=16,alpha=32", "recipe": "r.toml"}, "Both recipe and tuned_at"),
        ({"init": "C"}, "init"),
    ],
)
def test_axolotls_schema_checks_our_settings(settings, words):
    """A setting that is none, or cannot be read, is refused by Axolotl's own check of the YAML."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    given = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    config = DictDefault({**given, "rankaware": settings})
    prepare_plugins(config)
    with pytest.raises(ValueError, match=words):
        validate_config(config)


def test_groups_that_axolotl_would_make_are_refused():
    """embedding_lr and the like, which the plug-in would leave unheard, are refused before training."""
    from axolotl.utils.dict import DictDefault

    from rankaware_optim.integrations.axolotl import Plugin

    with pytest.raises(
        OptimizerError, match="embedding_lr is of groups that Axolotl makes"
    ):
        Plugin().post_trainer_create(
            DictDefault({"embedding_lr": 1e-5, "learning_rate": 1e-4}), None
        )
