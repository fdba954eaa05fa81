"""Tests of RankAwareOptimizer on a CUDA device.

Every run is compared with the native class on groups whose learning rates are written out by hand.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from rankaware_optim import RankAwareOptimizer, Reference

from ...helpers.models import batches, mlp, snapshot
from ...helpers.optimizers import multiplier

DEVICE = os.environ.get("RANKAWARE_DEVICE", "cuda")
# bitsandbytes keeps tensors of fewer than 4,096 entries in 32 bits
WIDTH, RANKS = 1024, (4, 32)
LR, STEPS = 1e-3, 4
SETTINGS = {"weight_decay": 0.1, "betas": (0.9, 0.99)}

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="There is no CUDA device here."
)
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="There is no CUDA device here. RANKAWARE_DEVICE=cpu runs what a CPU can.",
    ),
    # CUDA libraries issue warnings of their own. Only ours are errors.
    pytest.mark.filterwarnings(
        "ignore::UserWarning",
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "error::rankaware_optim.RankAwareWarning",
    ),
]
KERNELS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


def new_model():
    """Return a model with two LoRA layers, of ranks 4 and 32, and a head."""
    return mlp(RANKS, width=WIDTH, seed=3).to(DEVICE)


def ours(model, kind, lr, **settings):
    own = {"lr": lr, "tuned_at": Reference(rank=16, alpha=16)}
    return RankAwareOptimizer(model, kind, **own, **SETTINGS, **settings)


def by_hand(model, kind, lr, **settings):
    """Return the native class with one group for each parameter, at its converted learning rate."""
    groups = []
    for name, param in model.named_parameters():
        rank = RANKS[int(name[5])] if name.startswith("layer") else None
        if param.requires_grad:
            moved = lr * multiplier(rank, width=WIDTH)
            groups.append({"params": [param], "lr": moved})
    assert len({float(group["lr"]) for group in groups}) == len(RANKS) + 1
    return kind(groups, lr=lr, **SETTINGS, **settings)


def agrees(train, within=1e-3, *, kind=torch.optim.AdamW, make=new_model, **settings):
    """Check that `train(model, opt)` ends with the same weights with our optimizer and with the native one.

    Weights may differ by `within` times the learning rate.
    """
    ends = []
    for build in (ours, by_hand):
        model = make()
        start = snapshot(model)
        train(model, build(model, kind, **copy.deepcopy({"lr": LR, **settings})))
        ends.append(snapshot(model))
        assert not torch.equal(*(end["layer1.lora_B"] for end in (start, ends[-1])))
    for name, is_ in ends[0].items():
        near = {"rtol": 1e-6, "atol": within * LR, "msg": name}
        torch.testing.assert_close(is_, ends[1][name], **near)


def inputs(steps=STEPS):
    yield from (x.to(DEVICE) for x in batches(steps, width=WIDTH))


def loss_of(model, x):
    return (model(x).float() - x[:, :3].float().sin()).square().mean()


def in_bf16(model, x):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return loss_of(model, x)


def steps(model, opt, forward=loss_of, step=None):
    for x in inputs():
        opt.zero_grad()
        forward(model, x).backward()
        (step or opt.step)()


# --- kernels and learning rates ----------------------------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("forward", [loss_of, in_bf16])
def test_every_kernel_trains_at_the_laws_rates(kernel, forward):
    """The for-loop, foreach and fused kernels of AdamW update every parameter as the native class
    does, also under autocast.
    """
    agrees(lambda model, opt: steps(model, opt, forward), **kernel)


@each_kernel
def test_a_rate_on_the_device_follows_its_schedule(kernel):
    """If the base learning rate is a tensor on the device, a change of it takes effect at the next step."""
    if kernel == {"foreach": True}:
        kernel = {"foreach": True, "capturable": DEVICE == "cuda"}
        if DEVICE == "cpu":
            pytest.skip(
                "foreach with a tensor as lr needs capturable, which needs CUDA."
            )

    def train(model, opt):
        for x in inputs():
            opt.zero_grad()
            loss_of(model, x).backward()
            opt.step()
            for group in opt.param_groups:
                group["lr"].mul_(0.5)

    agrees(train, lr=torch.tensor(LR, device=DEVICE), **kernel)


@each_kernel
@pytest.mark.parametrize("infinite", [None, 2])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_in_fp16(kernel, infinite, unscale):
    """Under GradScaler in fp16, updates equal the native ones, and a step with an infinite gradient
    is skipped.
    """

    def train(model, opt):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0)
        for i, x in enumerate(inputs()):
            opt.zero_grad()
            scale = scaler.get_scale()
            with torch.autocast(DEVICE, dtype=torch.float16):
                loss = loss_of(model, x)
            scaler.scale(loss).backward()
            if i == infinite:
                model.head.weight.grad[0, 0] = torch.inf
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            assert scaler.get_scale() == scale * (0.5 if i == infinite else 1.0)

    agrees(train, **kernel)


@needs_cuda
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_in_8_bits(name):
    """bitsandbytes' 8-bit and paged AdamW update every weight exactly as the native class does."""

    def train(model, opt):
        steps(model, opt)
        assert opt.state[model.layer1.lora_A]["state1"].dtype is torch.uint8

    kind = getattr(pytest.importorskip("bitsandbytes").optim, name)
    agrees(train, 0.0, kind=kind)


# --- graphs ---------------------------------------------------------------------------------------------------------


@needs_cuda
def test_a_captured_step_reads_gradient_and_rate():
    """A step that is captured in a CUDA graph reads the current gradients and learning rates at every replay."""

    def train(model, opt):
        first, *others = inputs()
        loss_of(model, first).backward()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # one step makes the moments
            opt.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which captures, and does not step
            opt.step()
        for x in others:
            opt.zero_grad(set_to_none=False)  # the graph reads these tensors
            loss_of(model, x).backward()
            for group in opt.param_groups:
                group["lr"].mul_(0.5)
            graph.replay()

    agrees(train, lr=torch.tensor(LR, device=DEVICE), capturable=True)


@needs_cuda
@pytest.mark.parametrize("kernel", [{}, {"capturable": True}], ids=str)
def test_a_step_compiled_by_inductor(kernel):
    """A step compiled with torch.compile's default backend updates the weights as an uncompiled
    native step does.
    """

    def train(model, opt):
        torch.compiler.reset()
        is_ours = isinstance(opt, RankAwareOptimizer)
        steps(model, opt, step=torch.compile(opt.step) if is_ours else opt.step)

    agrees(train, 5e-3, **kernel)


# --- sharding on one device -----------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    """Yield the device mesh of a process group that has this process alone."""
    import torch.distributed as dist

    backend = "cuda:nccl,cpu:gloo" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    yield dist.device_mesh.init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


def sharded(mesh, **settings) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = new_model()
    for layer in (model.layer0, model.layer1):
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


@each_kernel
def test_fsdp2_on_one_device(one_process, kernel):
    """Parameters sharded by fully_shard are updated as the native class updates them."""
    agrees(steps, make=lambda: sharded(one_process), **kernel)


@needs_cuda
@pytest.mark.parametrize("kernel", [{"foreach": True}, {"fused": True}], ids=str)
def test_cpu_offload(one_process, kernel):
    """With FSDP2's CPU offloading, the step runs on the CPU and updates the weights as the native class does."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    def train(model, opt):
        steps(model, opt)
        assert opt.state[model.layer0.lora_A]["exp_avg"].device.type == "cpu"

    policy = CPUOffloadPolicy()
    agrees(train, make=lambda: sharded(one_process, offload_policy=policy), **kernel)
