"""The documentation site: ``make docs`` builds it into docs/_build/html."""

from sparsek_vllm._version import __version__

project = "sparsek-vllm"
author = "the sparsek-vllm authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sparsek-vllm {version}"
html_show_copyright = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
copybutton_exclude = ".linenos, .gp, .go"
