"""The examples of every public docstring and of the pages, run; and that there are some."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import mlx_welford as mw
import pytest


def modules() -> list[str]:
    """All but the self-test, which is a program."""
    found = pkgutil.walk_packages(mw.__path__, "mlx_welford.")
    left_out = ("mlx_welford._ext", "mlx_welford.selftest", "mlx_welford.__main__")
    return ["mlx_welford", *(m.name for m in found if not m.name.startswith(left_out))]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def examples_of(value: object) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")


PUBLIC = {
    f"{name}.{member}": getattr(load(name), member)
    for name in ("mlx_welford", "mlx_welford.compat.torch", "mlx_welford.compat.gluon")
    for member in load(name).__all__
}


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    result = doctest.testmod(load(name), raise_on_error=False)
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example(name: str) -> None:
    assert examples_of(PUBLIC[name])


def test_the_public_names_are_among_those_run() -> None:
    """testmod() runs what a module defines, so each has to come from one that is run."""
    assert {value.__module__ for value in PUBLIC.values()} <= set(modules())


ROOT = Path(__file__).parents[2]
BLOCKS = {
    str(page.relative_to(ROOT)): blocks
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    if (blocks := re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
}


@pytest.mark.parametrize("page", BLOCKS)
def test_pages(page: str) -> None:
    """Their blocks in their order, in one namespace, as a reader would paste them."""
    namespace: dict[str, object] = {}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), namespace)


def test_pages_with_examples_are_found() -> None:
    assert {"README.md", "docs/index.md", "docs/guides/groups.md"} <= BLOCKS.keys()
