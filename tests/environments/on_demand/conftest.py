"""Collects each test file of this folder only if the package that it tests is installed."""

from importlib.util import find_spec

TOOLS = {
    "automodel": "nemo_automodel",
    "litgpt": "litgpt",
    "postgresql": "psycopg",
    "ray": "ray",
    "torchtune": "torchtune",
    "unsloth": "unsloth",
}
collect_ignore = [
    f"test_{name}.py" for name, tool in TOOLS.items() if find_spec(tool) is None
]
