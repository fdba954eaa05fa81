"""One of two processes, which joins the other over gloo on this machine and runs the functions that
a test sends.

It is started as a script: `python worker.py RANK PORT_OF_THE_GROUP PORT_OF_THE_TEST`.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import types
import warnings
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2


def main(rank: int, group_port: int, test_port: int) -> None:
    # the name that tests have under pytest's importlib mode
    sys.modules["tests"] = package = types.ModuleType("tests")
    package.__path__ = [str(Path(__file__).parents[2])]
    _join(rank, group_port)
    with Client(
        ("127.0.0.1", test_port), authkey=bytes.fromhex(os.environ["TEST_KEY"])
    ) as test:
        test.send(rank)
        _serve(test)


def _join(rank: int, port: int) -> None:
    here = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": WORLD,
        "LOCAL_WORLD_SIZE": WORLD,
    }
    os.environ.update({key: str(value) for key, value in here.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))


def _serve(test: Connection) -> None:
    while True:
        try:
            message = test.recv_bytes()
        except EOFError:
            return
        test.send_bytes(pickle.dumps(_answer(message)))


def _answer(message: bytes) -> tuple[bool, object]:
    """Return (True, the function's result) or (False, the traceback).

    Warnings are errors, except those to ignore.
    """
    try:
        function, args, ignored = pickle.loads(message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for text, category, module in ignored:
                warnings.filterwarnings("ignore", text, category, module)
            return True, function(*args)
    except BaseException:
        return False, traceback.format_exc()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
