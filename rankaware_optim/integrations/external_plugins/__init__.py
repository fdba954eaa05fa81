"""Files that ms-swift loads by their path, from a folder of their own, which it puts in front of sys.path."""

from pathlib import Path

SWIFT = Path(__file__).with_name("rankaware_swift.py")  # for --external_plugins

__all__ = ["SWIFT"]
