"""Puts the benchmarks' folder on the import path, and runs Hypothesis without deadlines and with
fixed examples.
"""

import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

sys.path.insert(0, str(Path(__file__).parents[1]))
