"""The documentation site: `make docs` builds it into build/docs, without a network.

Sphinx's source directory is the checkout, so that a link between two files is the same on the site
and on GitHub.
"""

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

project = "mlx-welford"
version = release = version_of(project)
project_copyright = "mlx-welford contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("docs/**.md", "docs/**.rst", "bench/README.md", "examples/README.md", "results/README.md"),
    *("tests/cuda_twin/README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
]
nitpicky = True
nitpick_ignore = [("py:class", "mlx_welford._layers.Epilogue")]  # of keywords; see Args
myst_heading_anchors = 4
napoleon_custom_sections = ["Shape"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"{project} {version}"
html_static_path = ["site"]
html_css_files = ["style.css"]
html_extra_path = ["redirect"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False

GITHUB = f"https://github.com/{os.environ.get('GITHUB_REPOSITORY', 'OWNER/mlx-welford')}"
PUBLIC = ("mlx_welford", "mlx_welford.compat.torch", "mlx_welford.compat.gluon")
# Pages of other documentation, for the names that signatures and docstrings refer to.
MLX = "https://ml-explore.github.io/mlx/build/html/python/"
PYTHON = "https://docs.python.org/3/library/"
ELSEWHERE = {
    "mlx.core.array": f"{MLX}_autosummary/mlx.core.array.html",
    "mlx.core.Device": f"{MLX}_autosummary/mlx.core.Device.html",
    "mlx.core.Dtype": f"{MLX}_autosummary/mlx.core.Dtype.html",
    "mlx.core.Stream": f"{MLX}_autosummary/mlx.core.Stream.html",
    "mlx.core.distributed.Group": f"{MLX}_autosummary/mlx.core.distributed.Group.html",
    "mlx.nn.Module": f"{MLX}nn/module.html",
    "mlx.nn.layers.base.Module": f"{MLX}nn/module.html",
    "collections.abc.Callable": f"{PYTHON}collections.abc.html#collections.abc.Callable",
    "collections.abc.Iterator": f"{PYTHON}collections.abc.html#collections.abc.Iterator",
    "collections.abc.Mapping": f"{PYTHON}collections.abc.html#collections.abc.Mapping",
    "collections.abc.Sequence": f"{PYTHON}collections.abc.html#collections.abc.Sequence",
}


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(math, None), block_renderers=(math_block, None)
    )
    app.add_directive("command-help", CommandHelp)
    app.connect("source-read", link_to_github)
    app.connect("missing-reference", link_elsewhere)
    app.connect("env-check-consistency", check_public_names)


def math(writer: Any, node: nodes.math) -> None:
    """Formulas as MathML, which browsers draw without a script."""
    writer.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def math_block(writer: Any, node: nodes.math_block) -> None:
    formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


class CommandHelp(SphinxDirective):
    """What `python -m mlx_welford COMMAND --help` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "mlx_welford", self.arguments[0], "--help"]
        environment = {**os.environ, "COLUMNS": "88"}
        text = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return [nodes.literal_block(text.stdout, text.stdout, language="text")]


def link_to_github(app: Sphinx, docname: str, source: list[str]) -> None:
    """Completes links to GitHub's own pages, which files in the root give as ../../compare/..."""
    source[0] = re.sub(r"(\]\(|\]: )\.\./\.\./(compare|issues)", rf"\1{GITHUB}/\2", source[0])


def link_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.Node
) -> nodes.Node | None:
    target = ELSEWHERE.get(node.get("reftarget"))
    return target and nodes.reference("", "", content, refuri=target, internal=False)


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of each public name that the reference leaves out."""
    documented = {name for name, *_ in env.domains.python_domain.get_objects()}
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            if f"{module}.{name}" not in documented:
                logging.getLogger(__name__).warning("no page has %s.%s", module, name)
