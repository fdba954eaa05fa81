"""LoRA adapters with the widths of a Llama model, in PEFT's layout, for the benchmarks of cost."""

from __future__ import annotations

from torch import nn

RANK = 16


def projections(hidden: int, kv: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """Return the (fan_in, fan_out) of the seven linear layers in a Llama block, by name."""
    narrow, up = (hidden, kv), (hidden, intermediate)
    return {"q": (hidden, hidden), "k": narrow, "v": narrow, "o": (hidden, hidden)} | {
        "gate": up,
        "up": up,
        "down": (intermediate, hidden),
    }


LLAMA_8B_EIGHTH = projections(512, 128, 1792)  # 32 blocks; every width divided by 8
LLAMA_8B = projections(4096, 1024, 14336)  # 32 blocks at full width


class Pair(nn.Module):
    """A LoRA pair with PEFT's names and attributes, without the frozen weight."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(fan_in, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, fan_out, bias=False)})
        self.r = {"default": RANK}
        self.scaling = {"default": 2.0}
        nn.init.zeros_(self.lora_B["default"].weight)


def adapters(blocks: int, shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Return a model that has only LoRA pairs: `blocks` blocks with one pair for every entry of `shapes`."""
    return nn.ModuleList(
        nn.ModuleDict({name: Pair(*fans) for name, fans in shapes.items()})
        for _ in range(blocks)
    )
