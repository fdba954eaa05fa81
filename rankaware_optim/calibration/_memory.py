"""Out of memory: told from other errors, and what the run held given back."""

from __future__ import annotations

import gc

import torch

__all__ = ["is_out_of_memory", "release_memory"]

# What torch says on the CPU (Linux, Windows), on MPS and in cuBLAS, where the error is a plain RuntimeError.
_SAID = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def release_memory() -> None:
    """Collect what only cycles hold, and give the accelerator's cached blocks back.

    Call it once the error is gone: its traceback holds the frames, and they hold the tensors.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
