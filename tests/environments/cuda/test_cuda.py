"""The wrapper on a CUDA device: what a CPU cannot run, every parameter against AdamW by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ...helpers.models import same
from .by_hand import (
    BETAS,
    DECAY,
    DEVICE,
    EPS,
    LR,
    ByHand,
    gradients,
    inputs,
    loss_of,
    needs_cuda,
    needs_device,
    new_model,
    ours,
    rates,
    values,
)

pytestmark = [
    needs_device,
    # Libraries of a device warn of their own affairs; ours stay errors.
    pytest.mark.filterwarnings(
        "ignore::UserWarning",
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "error::rankaware_optim.RankAwareWarning",
    ),
]

KERNELS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


def trained(model, opt, forward=loss_of):
    """Steps of plain training beside the update by hand."""
    hand = ByHand(model)
    for x in inputs():
        opt.zero_grad()
        forward(model, x).backward()
        hand.step(gradients(model))
        opt.step()
    return hand


# --- kernels and rates ----------------------------------------------------------------------------------------------


def in_bf16(model, x):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return loss_of(model, x)


@each_kernel
@pytest.mark.parametrize("forward", [loss_of, in_bf16])
def test_every_kernel_trains_at_the_laws_rates(kernel, forward):
    """for-loop, foreach and fused AdamW on the device update every parameter as by hand, also under autocast."""
    model = new_model()
    trained(model, ours(model, **kernel), forward).agrees(model)


@each_kernel
def test_a_rate_on_the_device_follows_its_schedule(kernel):
    """A base rate that is a tensor on the device, filled between steps, is read at every step."""
    if kernel == {"foreach": True}:
        kernel = {"foreach": True, "capturable": DEVICE == "cuda"}
        if DEVICE == "cpu":
            pytest.skip(
                "foreach with a tensor rate asks for capturable, which is CUDA's."
            )
    model, lr = new_model(), torch.tensor(LR, device=DEVICE)
    opt, hand = ours(model, lr=lr, **kernel), ByHand(model)
    for i, x in enumerate(inputs()):
        for group in opt.param_groups:
            group["lr"].fill_(LR / (i + 1))
        opt.zero_grad()
        loss_of(model, x).backward()
        hand.step(gradients(model), LR / (i + 1))
        opt.step()
    hand.agrees(model)


# --- precision ------------------------------------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("infinite", [None, 2])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_in_fp16(kernel, infinite, unscale):
    """fp16 under GradScaler: updates are those of the unscaled gradients, and a step with an infinite one is left."""
    model = new_model()
    opt, hand = ours(model, **kernel), ByHand(model)
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
        if i != infinite:
            hand.step(gradients(model, 1.0 if unscale else scale))
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == scale * (0.5 if i == infinite else 1.0)
    hand.agrees(model)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def bitsandbytes(name):
    return getattr(pytest.importorskip("bitsandbytes").optim, name)


@needs_cuda
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_in_8_bits(name):
    """With moments in 8 bits it is, bit for bit, bitsandbytes' class with every rate written out, paged or not."""
    ends = []
    for make in (ours, groups_by_hand):
        model = new_model()
        opt = make(model, bitsandbytes(name))
        for x in inputs():
            opt.zero_grad()
            loss_of(model, x).backward()
            opt.step()
        assert opt.state[model.layer1.lora_A]["state1"].dtype is torch.uint8
        ends.append(values(model))
    assert same(*ends)


def groups_by_hand(model, kind):
    named = rates().items()
    groups = [{"params": [model.get_parameter(n)], "lr": rate} for n, rate in named]
    return kind(groups, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)


# --- graphs ---------------------------------------------------------------------------------------------------------


@needs_cuda
def test_a_captured_step_reads_gradient_and_rate():
    """A step captured in a CUDA graph, capturable with a tensor rate, follows both at every replay."""
    model, lr = new_model(), torch.tensor(LR, device="cuda")
    opt = ours(model, lr=lr, capturable=True)
    hand = ByHand(model)
    first, *others = inputs()
    loss_of(model, first).backward()
    hand.step(gradients(model))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # one step makes the moments
        opt.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which captures, and does not step
        opt.step()
    hand.agrees(model)
    for i, x in enumerate(others, 2):
        opt.zero_grad(set_to_none=False)  # the graph reads these tensors
        loss_of(model, x).backward()
        for group in opt.param_groups:
            group["lr"].fill_(LR / i)
        hand.step(gradients(model), LR / i)
        graph.replay()
    hand.agrees(model)


@needs_cuda
@pytest.mark.parametrize("kernel", [{}, {"capturable": True}], ids=str)
def test_a_step_compiled_by_inductor(kernel):
    """torch.compile(opt.step) with its own backend updates as by hand."""
    model = new_model()
    opt, hand = ours(model, **kernel), ByHand(model)
    torch.compiler.reset()
    step = torch.compile(opt.step)
    for x in inputs():
        opt.zero_grad()
        loss_of(model, x).backward()
        hand.step(gradients(model))
        step()
    hand.agrees(model, 5e-3)


# --- sharding on one device -----------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
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
    """fully_shard's DTensors are updated as by hand."""
    model = sharded(one_process)
    trained(model, ours(model, **kernel)).agrees(model)


@needs_cuda
@pytest.mark.parametrize("kernel", [{"foreach": True}, {"fused": True}], ids=str)
def test_cpu_offload(one_process, kernel):
    """With parameters and moments on the CPU the step runs there, and updates as by hand."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = sharded(one_process, offload_policy=CPUOffloadPolicy())
    opt = ours(model, **kernel)
    trained(model, opt).agrees(model)
    assert {p.device.type for group in opt.param_groups for p in group["params"]} == {
        "cpu"
    }
    assert opt.state[model.layer0.lora_A]["exp_avg"].device.type == "cpu"
