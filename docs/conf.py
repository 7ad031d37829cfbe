"""How Sphinx makes a site from this folder: `make docs`."""

from importlib.metadata import version as installed

from sphinx.application import Sphinx

project = "hmoe_ds"
author = "the hmoe_ds maintainers"
release = version = installed("hmoe-ds")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "hmoe_ds"
# Nothing is loaded from elsewhere, and nobody needs the sources of the pages a second time.
html_copy_source = False
exclude_patterns = ["_build"]

# Links such as RESULTS.md#loader-part-5 lead to headings, as on a page of Markdown anywhere.
myst_heading_anchors = 3
# A block without a language is a command, or what one printed: not Python.
highlight_language = "none"

# `text` in a docstring is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Attributes belong to the text of their class: as entries of their own, fields would be there twice.
napoleon_use_ivar = True


def _skip_fields(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Fields of named tuples are described in their class; Python's own words for each say nothing."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_fields)
