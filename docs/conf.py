"""The site. Built by `tox run -e docs`; nothing is fetched while it is built."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import rankaware_optim

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="transformers"
)  # they would be on example pages

project = "rankaware-optim"
author = "The rankaware-optim maintainers"
copyright = "the rankaware-optim maintainers, Apache-2.0"
version = release = rankaware_optim.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    # our own, in _ext
    "docstrings",
    "from_results",
    "llms_txt",
    "mathml",
    "thumbnails",
]
exclude_patterns = [
    "_build",
    "_ext",
    "_templates",
    "examples/*.ipynb",  # the gallery makes them from its scripts
]
nitpicky = False

templates_path = ["_templates"]
html_theme = "furo"
html_title = f"rankaware-optim {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_disable_syntax = [
    "myst_line_comment"
]  # otherwise lines that begin with a percent sign vanish
myst_heading_anchors = 3
suppress_warnings = [
    "myst.header"
]  # pages of results may begin at any level of heading

nb_execution_mode = "off"  # from_results runs the notebook

default_role = "code"
smartquotes = False  # they turn --option into a dash
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Trimmed to the names used, in Sphinx's plain-text format, so that the build needs no network.
intersphinx_mapping = {
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        str(HERE / "inventories" / "torch.inv"),
    ),
    "optuna": (
        "https://optuna.readthedocs.io/en/stable/",
        str(HERE / "inventories" / "optuna.inv"),
    ),
}

sphinx_gallery_conf = {
    "examples_dirs": str(HERE.parent / "examples"),
    "gallery_dirs": "examples",
    "filename_pattern": r"/(peft_loop|calibrate_peft)\.py",  # run only the examples that need no more than PEFT
    "image_scrapers": (),
    "reset_modules": (),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "write_computation_times": False,
    "min_reported_time": 3600,  # never: times differ between machines
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
}
