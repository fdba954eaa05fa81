"""Entry point of `python -m rankaware_optim`."""

from .cli import main

main(prog_name="rankaware")
