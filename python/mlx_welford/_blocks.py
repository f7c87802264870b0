"""Editing and replacing blocks of a model by functions of the caller, and undoing it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mlx.nn import Module

from mlx_welford._fusing import Row, named_layers

__all__ = ["Make", "calls", "given_back", "replace_blocks", "swap"]

Make = Callable[[Any], Module | None]
"""Returns the same block, edited; another module to put in its place; or None to leave it."""


def replace_blocks(root: list[Any], also: Mapping[type[Module], Make]) -> list[Row]:
    """Calls the functions for the blocks of exactly these classes, outer blocks first.

    ``root`` holds the model alone, which may be such a block itself.
    """
    paths = {id(module): path for path, module in named_layers(root[0])}
    rows: list[Row] = []

    def change(block: Module) -> Module:
        make = also.get(type(block))
        if make is None or vars(block).keys() & {"_edits", "_stands_for"}:
            return block
        was, before = type(block).__name__, _State(block)
        made = make(block)
        if made is None:
            now, made = "as it was", block
        elif not isinstance(made, Module):
            raise TypeError(
                f"[accelerate] 'also' must give a Module or None for {was} "
                f"but gave {type(made).__name__}."
            )
        elif made is block:
            now = "edited"
            vars(block)["_edits"] = before.changed()
        else:
            now = f"replaced by {type(made).__name__}"
            _give_mode(made, block)
            vars(made)["_stands_for"] = block
        rows.append((paths.get(id(block), ""), was, now))
        return made

    swap(root, change)
    return rows


def given_back(module: Module) -> Module:
    """A block as it was before ``replace_blocks``."""
    for edit in reversed(vars(module).pop("_edits", [])):
        edit.undo()
    block: Module = vars(module).pop("_stands_for", module)
    _give_mode(block, module)
    return block


def _give_mode(module: Module, other: Module) -> None:
    """Puts a module into the mode of another; if it is in that mode, its layers keep theirs."""
    if module.training != other.training:
        module.train(other.training)


def swap(container: Any, change: Callable[[Module], Any], *, inner_first: bool = False) -> None:
    """Puts change(module) in the place of every module within a list, dictionary or module.

    A module in several places is changed once.
    """
    changed: dict[int, tuple[Module, Any]] = {}  # holds the module, so that its id is not reused

    def visit(container: Any) -> None:
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(items):
            if not isinstance(value, Module):
                if isinstance(value, dict | list):
                    visit(value)
                continue
            if id(value) not in changed:
                changed[id(value)] = value, value
                if inner_first:
                    visit(value)
                changed[id(value)] = value, change(value)
                if not inner_first:
                    visit(changed[id(value)][1])
            new = changed[id(value)][1]
            if new is not value:
                if isinstance(container, Module):
                    setattr(container, key, new)
                else:
                    container[key] = new

    visit(container)


class _Missing:
    """Stands for an attribute that was not there."""


class _Edit(NamedTuple):
    """The state of a module, list or dictionary of a block before it was changed."""

    owner: Any
    of_vars: bool  # True for vars(module), False for the module as a dictionary
    kind: type
    before: dict[Any, Any]  # only what was changed, since the rest may be trained on
    order: list[Any]

    def undo(self) -> None:
        if isinstance(self.owner, list):
            self.owner[:] = [self.before[i] for i in self.order]
            return
        if isinstance(self.owner, Module):
            self.owner.__class__ = self.kind
        items = vars(self.owner) if self.of_vars else self.owner
        values = {**items, **self.before}
        values = {k: v for k, v in values.items() if v is not _Missing}
        dict.clear(items)
        dict.update(items, {k: values[k] for k in (*self.order, *values) if k in values})


class _State:
    """The attributes of a block and of all modules in it, at some time."""

    def __init__(self, block: Module) -> None:
        self.containers = [
            (owner, of_vars, type(owner), dict(_items(owner, of_vars)))
            for owner, of_vars in _containers(block, set())
        ]

    def changed(self) -> list[_Edit]:
        """An edit for everything that is different now."""
        edits = []
        for owner, of_vars, kind, before in self.containers:
            now = dict(_items(owner, of_vars))
            differs = {k for k in now.keys() | before.keys() if _differ(now, before, k)}
            if differs or kind is not type(owner):
                kept = before.keys() if isinstance(owner, list) else differs
                values = {k: before.get(k, _Missing) for k in kept}
                edits.append(_Edit(owner, of_vars, kind, values, list(before)))
        return edits


def _containers(owner: Any, seen: set[int]) -> Iterator[tuple[Any, bool]]:
    if not isinstance(owner, dict | list) or id(owner) in seen:
        return
    seen.add(id(owner))
    yield owner, False
    if isinstance(owner, Module):
        yield owner, True
    for _, value in _items(owner, of_vars=False):
        yield from _containers(value, seen)


def _items(owner: Any, of_vars: bool) -> Iterator[tuple[Any, Any]]:
    """Copies sets, because freeze() changes the set of frozen names in place."""
    if of_vars:
        owner = vars(owner)
    items = enumerate(owner) if isinstance(owner, list) else owner.items()
    return ((k, set(v) if isinstance(v, set) else v) for k, v in items)


def _differ(now: dict[Any, Any], before: dict[Any, Any], key: Any) -> bool:
    if key not in now or key not in before:
        return True
    a, b = now[key], before[key]
    return bool(a != b) if isinstance(a, set) else a is not b


def calls(block: Module, name: str) -> int:
    """Number of calls of an attribute in a block's ``__call__``; 0 if there is no source."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(type(block).__call__)))
    except (OSError, TypeError, SyntaxError):  # not from a file, or not Python
        return 0
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        for node in ast.walk(code)
    )
