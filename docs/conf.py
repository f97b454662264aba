"""Sphinx settings. The build executes nothing; pages are made by ``_ext/pages.py``."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import numpydoc.docscrape  # noqa: E402
import pages  # noqa: E402

import attention_ref  # noqa: E402

pages.make()
numpydoc.docscrape.NumpyDocString.sections["Source"] = ""  # shown by _Section below

project = "attention_ref"
author = "the attention_ref authors"
project_copyright = "2026, the attention_ref authors"
version = release = attention_ref.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "methods/*.inc", "_ext"]
root_doc = "index"
nitpicky = True
default_role = None
math_number_all = False

# numpydoc: shapes are prose ("ndarray, shape (..., T, D)"), not cross-references.
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
numpydoc_validation_checks = set()
autodoc_typehints = "none"
autodoc_use_legacy_class_based = False

sphinx_gallery_conf = {
    "examples_dirs": str(pages.STAGED),
    "gallery_dirs": "gallery",
    "plot_gallery": "False",
    "filename_pattern": r"^(?!)",
    "ignore_pattern": r"__init__\.py",
    "subsection_order": pages.family_order,
    "show_signature": False,
    "remove_config_comments": True,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "copyfile_regex": "",
}

html_theme = "pydata_sphinx_theme"
html_title = "attention_ref"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_show_sourcelink = False
html_sidebars = {"*": []}  # pages without a section of their own: room for wide tables
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": {"*": ["page-toc"], "gallery/**": ["page-toc"], "methods/**": []},
}
html_context = {"default_mode": "light"}
suppress_warnings = ["config.cache"]


class _Section:
    """``Source`` is a section that numpydoc does not know, and bars are moduli."""

    @staticmethod
    def rename(app, what, name, obj, options, lines):
        lines[:] = pages.prose(lines)
        for i, line in enumerate(lines[:-1]):
            if line == "Source" and set(lines[i + 1]) == {"-"}:
                lines[i : i + 2] = [".. rubric:: Source", ""]


def setup(app):
    """Hook in before numpydoc reads the docstring."""
    app.connect("autodoc-process-docstring", _Section.rename, priority=100)
