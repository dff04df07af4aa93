"""The site: `sphinx-build -W docs docs/_build` with pagedattn and its `docs` extra installed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import pagedattn

project = "pagedattn"
copyright = "the pagedattn authors"
release = pagedattn.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# The generated pages here are parts of performance/index.md and of block-manager.md.
exclude_patterns = ["_build", "performance/generated/summary.md", "performance/generated/managers.md"]

autodoc_typehints = "none"  # the docstrings tell shapes and dtypes too
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
nitpicky = False

html_theme = "furo"
html_title = "pagedattn"
