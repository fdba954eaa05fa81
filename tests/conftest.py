"""Hypothesis without deadlines and with fixed examples: a busy machine must not fail a test, nor a lucky draw."""

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")
