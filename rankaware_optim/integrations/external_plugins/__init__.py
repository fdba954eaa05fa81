"""Files that ms-swift loads by path. They have a separate folder, since it puts their folder first
in sys.path.
"""

from pathlib import Path

SWIFT = Path(__file__).with_name("rankaware_swift.py")  # for --external_plugins

__all__ = ["SWIFT"]
