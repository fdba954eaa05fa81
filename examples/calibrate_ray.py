"""
Calibrate on a Ray cluster
==========================

Every Ray task calls ``calibrate`` with the same storage, so the tasks share the trials of one study. Ray gives each
task a GPU, and starts a task again if its node fails. Run this script on the head node of the cluster, with a path
that every node can access::

    python calibrate_ray.py /shared/study.journal
"""

import sys

import ray
import torch

import rankaware_optim as ra


class Adapted(torch.nn.Module):
    """A frozen layer with LoRA. Use your own model instead."""

    def __init__(self, rank):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 16) / 4, requires_grad=False)
        self.lora_A = torch.nn.Parameter(torch.randn(rank, 16) / 4)
        self.lora_B = torch.nn.Parameter(torch.zeros(16, rank))
        self.r, self.scaling = rank, 1.0

    def forward(self, x):
        return x @ (self.weight + self.scaling * self.lora_B @ self.lora_A).T


def train(trial):
    """Train a model at the rank of the trial, and yield the loss of each step."""
    torch.manual_seed(trial.seed)
    model = Adapted(trial.rank)
    opt = trial.optimizer(model)
    for _ in range(trial.steps):
        x = torch.randn(8, 16)
        loss = torch.nn.functional.cross_entropy(model(x), x.argmax(dim=1))
        loss.backward()
        opt.step()
        opt.zero_grad()
        yield loss


def calibrate(storage):
    """Run trials until all are done, and return the recipe. Every task makes this call."""
    return ra.calibrate(
        train,
        torch.optim.AdamW,
        ranks=(1, 16),
        steps=20,
        storage=storage,
        progress=False,
    )


if __name__ == "__main__":
    ray.init()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    task = ray.remote(calibrate).options(num_gpus=min(gpus, 1), max_retries=-1)
    recipes = ray.get([task.remote(sys.argv[1]) for _ in range(gpus or 2)])
    print(recipes[0].at(rank=8))
