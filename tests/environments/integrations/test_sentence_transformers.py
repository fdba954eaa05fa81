"""Tests of a real trainer of sentence-transformers, whose optimizer also trains the parameters of its loss."""

from __future__ import annotations

import pytest
import torch

import rankaware_optim as ra

from ...helpers.models import same
from .trainers import LR, QUIET, arguments, datasets, peft, transformers

st = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

pytestmark = QUIET
LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"]}
AT = {"lr": LR, "tuned_at": "r=4,alpha=4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a tiny BERT with its tokenizer, saved to a folder."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"w{i}" for i in range(27)),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, num_attention_heads=2, max_position_embeddings=16, **sizes
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def rows(count=64):
    pairs = [(f"w{i % 27}", f"w{(i + i % 3) % 27}", i % 3) for i in range(count)]
    names = ("first", "second", "label")
    return datasets.Dataset.from_dict(
        dict(zip(names, zip(*pairs, strict=True), strict=True))
    )


def trainer(base, folder, loss="SoftmaxLoss", data=rows, evaluated=None, **own):
    torch.manual_seed(0)
    model = st.SentenceTransformer(str(base), device="cpu")
    inner = model[0].auto_model
    inner.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA), inner)
    kind = st.SentenceTransformerTrainingArguments
    args = arguments(folder, kind, save_strategy="no", **own)
    made = losses.SoftmaxLoss(model, 16, 3)
    if loss == "dict":
        made = dict.fromkeys(("one", "two"), made)
    return st.SentenceTransformerTrainer(
        model, args, train_dataset=data(), eval_dataset=evaluated, loss=made
    )


def classifier(made):
    loss = made.loss["one"] if isinstance(made.loss, dict) else made.loss
    return loss.classifier


def weights_of(made):
    named = made.accelerator.unwrap_model(made.model).named_parameters()
    of_loss = classifier(made).named_parameters()
    return {name: p.detach().clone() for name, p in (*named, *of_loss)}


@pytest.mark.parametrize("mapping", [{}, {"classifier": 1e-5}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_trains_as_without_attach(base, tmp_path, mapping, decay):
    """At the reference's rank, all weights, also those of the loss, equal those of a trainer without attach."""
    own = {
        "learning_rate_mapping": mapping,
        "weight_decay": decay,
        "optim": "adamw_torch",
    }
    ours, plain = (trainer(base, tmp_path, **own) for _ in range(2))
    before = classifier(ours).weight.detach().clone()
    report = ra.attach(ours, "adamw", **AT)
    for made in (ours, plain):
        torch.manual_seed(1)  # for the dropout
        made.train()
    assert same(weights_of(ours), weights_of(plain))
    moved = (classifier(ours).weight - before).abs().max()
    assert 0 < moved <= (1e-4 if mapping else 1)
    assert {row.rank for row in report.rows if row.role != "other"} >= {4}


def test_the_rate_of_a_mapping_is_reported(base, tmp_path):
    """The report shows the learning rates of learning_rate_mapping for its parameters."""
    made = trainer(base, tmp_path, learning_rate_mapping={"classifier": 1e-5})
    report = ra.attach(made, "adamw", lr=LR, tuned_at="r=64,alpha=64")
    rates = {row.lr for row in report.rows if any("classifier" in n for n in row.names)}
    assert rates == {1e-5}


def test_the_readmes_lines_find_and_use_a_rate(base, tmp_path):
    """calibrate leaves every weight as it was, and a run with its recipe then trains."""
    made = trainer(base, tmp_path, max_steps=12)
    before = weights_of(made)
    recipe = ra.calibrate(made, "adamw", steps=6, trials=2, progress=False)
    assert same(weights_of(made), before)
    assert recipe.reference.rank == 4
    ra.attach(made, recipe=recipe)
    made.train()
    assert made.state.global_step == 12
    assert not torch.equal(classifier(made).weight, before["weight"])


def test_several_data_sets_with_losses_of_their_own(base, tmp_path):
    """If the data sets are a dict, each with its own loss, a part of every data set scores a trial."""
    both = lambda: datasets.DatasetDict(one=rows(), two=rows(32))  # noqa: E731
    made = trainer(base, tmp_path, "dict", both, max_steps=12)
    recipe = ra.calibrate(made, "adamw", steps=6, trials=1, progress=False)
    assert not any("training losses" in note for note in recipe.notes)
    assert {name: len(part) for name, part in made.train_dataset.items()} == {
        "one": 64,
        "two": 32,
    }
