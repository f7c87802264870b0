"""Turns preprocessed Metal source into what clang can compile and the executor can call.

The kernels' code stays as it is written, line by line. Changed are only declarations that clang
would refuse or ignore:

- ``threadgroup float shared[32];`` becomes a reference to memory that the executor hands out, the
  same for all threads of a threadgroup;
- ``constant`` in front of a *variable* becomes ``__constant``, the only constant address space in
  which clang lets variables live;
- a function constant becomes a variable that a dispatch sets;
- ``template [[host_name("...")]] [[kernel]] ...;`` is taken out and becomes a wrapper.

For every kernel two things are generated: in the kernels' own translation unit a function that
calls it with its arguments taken from a dispatch's bindings, and in a second translation unit the
table from which the executor knows names and parameters.

The reader is no C++ parser: it goes by tokens and brackets. It expects one declaration per kernel
name and kernels whose parameters carry Metal's attributes as attributes, not through macros that
survive preprocessing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

TOKEN = re.compile(
    r"""^[ \t]*\#[^\n]*            # line markers and pragmas
    | \s+
    | "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*'
    | [A-Za-z_]\w*
    | \.?[0-9](?:[eEpP][+-]|[\w.])*
    | ::
    | .""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)

OPENING = {"(": ")", "[": "]", "{": "}"}
CLOSING = {closing: opening for opening, closing in OPENING.items()}

# What can follow the type and name of a variable, and what says that there is none.
VARIABLE_ENDS = (";", "=", "{", "[", ",")
POINTER_ENDS = ("*", "&", "(", ")", ">")

# A built-in argument, as an expression over the executor's SimulatorThread `t`.
BUILT_INS = {
    "thread_position_in_grid": "simulator::position3(t->threadgroup_position_in_grid, "
    "t->threads_per_threadgroup, t->thread_position_in_threadgroup)",
    "thread_position_in_threadgroup": "simulator::index3(t->thread_position_in_threadgroup)",
    "threadgroup_position_in_grid": "simulator::index3(t->threadgroup_position_in_grid)",
    "threads_per_threadgroup": "simulator::index3(t->threads_per_threadgroup)",
    "dispatch_threads_per_threadgroup": "simulator::index3(t->threads_per_threadgroup)",
    "threadgroups_per_grid": "simulator::index3(t->threadgroups_per_grid)",
    "threads_per_grid": "simulator::product3(t->threadgroups_per_grid, t->threads_per_threadgroup)",
    "thread_index_in_threadgroup": "t->thread_index_in_threadgroup",
    "thread_index_in_simdgroup": "t->thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup": "t->simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup": "t->simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup": "t->simdgroups_per_threadgroup",
    "threads_per_simdgroup": "uint(kSimulatorLanes)",
    "thread_execution_width": "uint(kSimulatorLanes)",
}

SPACES = {
    "device": "kSimulatorDevice",
    "constant": "kSimulatorConstant",
    "threadgroup": "kSimulatorThreadgroup",
}


class SourceError(ValueError):
    """The source holds something that the reader cannot make sense of."""


@dataclass(frozen=True)
class Token:
    """A token and where it stands in the text."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Argument:
    """A kernel parameter: bound memory (``space``, ``index``) or a thread's ``built_in``.

    ``index`` is a constant expression; ``enabled`` names the function constant that switches the
    parameter on.
    """

    name: str
    built_in: str = ""
    space: str = ""
    reference: bool = False
    read_only: bool = False
    index: str = ""
    enabled: str = ""


@dataclass(frozen=True)
class Declaration:
    """A kernel function or function template."""

    name: str
    arguments: tuple[Argument, ...]
    template: bool
    host_name: str


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be dispatched: ``function`` is what to call, ``f`` or ``f<float, 4>``."""

    host_name: str
    function: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Translation:
    """The two translation units of a library, and what they contain."""

    kernels_source: str
    table_source: str
    kernels: tuple[Kernel, ...]


def tokenise(text: str) -> list[Token]:
    """The tokens of C++ text; white space and lines that start with # are left out."""
    return [
        Token(match.group(), match.start())
        for match in TOKEN.finditer(text)
        if not match.group().isspace() and not match.group().lstrip().startswith("#")
    ]


def closing_index(tokens: list[Token], opening: int) -> int:
    """The index of the bracket that closes the one at index ``opening``."""
    depth = 0
    for i in range(opening, len(tokens)):
        if tokens[i].text in OPENING:
            depth += 1
        elif tokens[i].text in CLOSING:
            depth -= 1
            if depth == 0:
                return i
    raise SourceError(f"unclosed {tokens[opening].text!r}")


def closing_angle(tokens: list[Token], opening: int) -> int:
    """The index of the ``>`` that closes the ``<`` at index ``opening``."""
    depth, i = 0, opening
    while i < len(tokens):
        if tokens[i].text in OPENING:
            i = closing_index(tokens, i)
        elif tokens[i].text == "<":
            depth += 1
        elif tokens[i].text == ">":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise SourceError("unclosed '<'")


def statement_end(tokens: list[Token], start: int) -> int:
    """The index of the semicolon that ends the statement starting at index ``start``."""
    i = start
    while i < len(tokens):
        if tokens[i].text in OPENING:
            i = closing_index(tokens, i)
        elif tokens[i].text == ";":
            return i
        i += 1
    raise SourceError("a statement without end")


def attributes(tokens: list[Token]) -> Iterator[tuple[str, str]]:
    """Name and argument ("" if none) of every attribute in ``[[name(argument), ...]]``."""
    i = 0
    while i + 1 < len(tokens):
        if tokens[i].text != "[" or tokens[i + 1].text != "[":
            i += 1
            continue
        end = closing_index(tokens, i)
        inside = tokens[i + 2 : end - 1]
        k = 0
        while k < len(inside):
            name, argument = inside[k].text, ""
            if k + 1 < len(inside) and inside[k + 1].text == "(":
                close = closing_index(inside, k + 1)
                argument = "".join(token.text for token in inside[k + 2 : close])
                k = close
            yield name, argument
            k += 2
        i = end + 1


def without_attributes(tokens: list[Token]) -> list[Token]:
    """The tokens without ``[[...]]``."""
    result, i = [], 0
    while i < len(tokens):
        if tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "[":
            i = closing_index(tokens, i)
        else:
            result.append(tokens[i])
        i += 1
    return result


def split_arguments(tokens: list[Token]) -> list[list[Token]]:
    """Splits at the commas that no bracket, template arguments included, encloses."""
    parts: list[list[Token]] = [[]]
    i = 0
    while i < len(tokens):
        end = i
        if tokens[i].text in OPENING:
            end = closing_index(tokens, i)
        elif tokens[i].text == "<":
            end = closing_angle(tokens, i)
        if tokens[i].text == ",":
            parts.append([])
        else:
            parts[-1].extend(tokens[i : end + 1])
        i = end + 1
    return [part for part in parts if part]


def read_argument(kernel: str, tokens: list[Token]) -> Argument:
    """Reads one parameter of a kernel."""
    given = dict(attributes(tokens))
    words = [token.text for token in without_attributes(tokens)]
    name = [word for word in words if re.fullmatch(r"[A-Za-z_]\w*", word)][-1]
    built_in = next((attribute for attribute in given if attribute in BUILT_INS), "")
    if built_in:
        return Argument(name, built_in=built_in)
    space = next((word for word in words if word in SPACES), "")
    if not space or not ({"*", "&"} & set(words)):
        raise SourceError(
            f"kernel '{kernel}': parameter '{name}' is neither memory nor a known thread attribute"
        )
    pointer = words.index("*") if "*" in words else words.index("&")
    return Argument(
        name,
        space=space,
        reference="*" not in words,
        read_only=space == "constant" or "const" in words[:pointer],
        index=given.get("threadgroup" if space == "threadgroup" else "buffer", ""),
        enabled=given.get("function_constant", ""),
    )


def read_arguments(kernel: str, tokens: list[Token]) -> tuple[Argument, ...]:
    """Reads a kernel's parameters; memory without an index takes the next free one, as in Metal."""
    arguments = [read_argument(kernel, part) for part in split_arguments(tokens)]
    for spaces in ({"device", "constant"}, {"threadgroup"}):
        taken = {a.index for a in arguments if a.space in spaces}
        if "" in taken and not all(index.isdigit() for index in taken - {""}):
            raise SourceError(f"kernel '{kernel}': give every parameter an index, or none a name")
        free = (str(index) for index in range(31) if str(index) not in taken)
        arguments = [
            replace(a, index=next(free)) if a.space in spaces and not a.index else a
            for a in arguments
        ]
    return tuple(arguments)


@dataclass
class Edit:
    """Replaces text[start:end], keeping its line breaks."""

    start: int
    end: int
    text: str


class Reader:
    """One pass over the tokens of a source, collecting kernels and edits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenise(text)
        self.edits: list[Edit] = []
        self.declarations: dict[str, Declaration] = {}
        self.instantiations: list[tuple[str, str]] = []
        self.function_constants: list[str] = []  # by name
        self.variables = 0
        self.read()

    def text_of(self, first: int, last: int) -> str:
        """The text from token ``first`` up to, not including, token ``last``."""
        if first >= last:
            return ""
        return self.text[self.tokens[first].start : self.tokens[last - 1].end]

    def edit(self, first: int, last: int, text: str) -> None:
        self.edits.append(Edit(self.tokens[first].start, self.tokens[last].end, text))

    def read(self) -> None:
        brackets: list[str] = []
        statement = 0  # the index of the first token of the current statement
        i = 0
        while i < len(self.tokens):
            word = self.tokens[i].text
            if word in OPENING:
                brackets.append(word)
            elif word in CLOSING:
                brackets.pop()
            enclosed = bool(brackets) and brackets[-1] != "{"
            if word == "template" and i == statement and self.tokens[i + 1].text != "<":
                i = self.read_instantiation(i)
            elif word == "kernel":
                self.read_kernel(statement, i)
            elif word in ("threadgroup", "constant") and not enclosed:
                i = self.read_variable(statement, i)
            if self.tokens[i].text in ("{", "}", ";") and not enclosed:
                statement = i + 1
            i += 1

    def read_instantiation(self, start: int) -> int:
        """``template [[host_name("n")]] [[kernel]] ...;``: remembers name and function."""
        end = statement_end(self.tokens, start)
        given = dict(attributes(self.tokens[start:end]))
        if "kernel" not in given and not any(t.text == "kernel" for t in self.tokens[start:end]):
            return end
        if "host_name" not in given:
            raise SourceError(f"an instantiation without host_name: {self.text_of(start, end)}")
        body = [t for t in without_attributes(self.tokens[start + 1 : end]) if t.text != "kernel"]
        # decltype(f<float>) f<float>   or   void f<float>(parameters)
        first = closing_index(body, 1) + 1 if body[0].text == "decltype" else 1
        angle = next(i for i in range(first, len(body)) if body[i].text == "<")
        last = closing_angle(body, angle)
        function = self.text[body[first].start : body[last].end]
        self.instantiations.append((json.loads(given["host_name"]), function))
        self.edit(start, end, "")
        return end

    def read_kernel(self, statement: int, keyword: int) -> None:
        """``[[kernel]] void name(parameters)`` or ``kernel void name(parameters)``."""
        i = keyword
        while self.tokens[i].text != "void":
            i += 1
        while self.tokens[i].text != "(":
            i = closing_index(self.tokens, i) + 1 if self.tokens[i].text == "[" else i + 1
        name = self.tokens[i - 1].text
        end = closing_index(self.tokens, i)
        if name in self.declarations:
            raise SourceError(f"two kernels are called '{name}'")
        given = dict(attributes(self.tokens[statement:i]))
        self.declarations[name] = Declaration(
            name,
            read_arguments(name, self.tokens[i + 1 : end]),
            template=self.tokens[statement].text == "template",
            host_name=json.loads(given["host_name"]) if "host_name" in given else name,
        )

    def read_variable(self, statement: int, keyword: int) -> int:
        """Edits the statement if its address space is that of a variable, not of a pointee.

        Returns the index of the last token dealt with.
        """
        before = [token.text for token in self.tokens[max(keyword - 2, 0) : keyword]]
        if before[-1:] == [")"] or before == [")", "const"]:
            return keyword  # qualifies a member function
        i = keyword + 1
        while self.tokens[i].text not in VARIABLE_ENDS + POINTER_ENDS:
            i = closing_angle(self.tokens, i) if self.tokens[i].text == "<" else i
            i += 1
        if self.tokens[i].text in POINTER_ENDS:
            return keyword
        if self.tokens[keyword].text == "constant":
            return self.read_constant(statement, keyword, i)
        return self.read_threadgroup_variable(statement, keyword)

    def read_constant(self, statement: int, keyword: int, after_name: int) -> int:
        end = statement_end(self.tokens, statement)
        index = dict(attributes(self.tokens[statement:end])).get("function_constant")
        if index is None:
            self.edit(keyword, keyword, "__constant")
            return keyword
        name = self.tokens[after_name - 1].text
        kind = self.text_of(keyword + 1, after_name - 1)
        number = len(self.function_constants)
        self.function_constants.append(name)
        symbol = f"simulator_function_constant_{number}"
        self.edit(
            statement,
            end,
            f'__global {kind} {name} __asm__("{symbol}"); '
            f'__global bool {name}_is_defined __asm__("{symbol}_defined"); '
            f'extern __constant uint {name}_bytes __asm__("{symbol}_bytes"); '
            f"__constant uint {name}_bytes = sizeof({kind}); "
            f'extern __constant uint {name}_index __asm__("{symbol}_index"); '
            f"__constant uint {name}_index = {index};",
        )
        return end

    def read_threadgroup_variable(self, statement: int, keyword: int) -> int:
        """``threadgroup T a[4], b;``: a reference to the executor's memory for each name."""
        end = statement_end(self.tokens, keyword)
        parts = split_arguments(self.tokens[keyword:end])
        first = parts[0]
        declarator = next(
            (i for i, token in enumerate(first) if token.text == "[" and i > 1), len(first)
        )
        kind = self.text[first[0].start : first[declarator - 2].end]
        declarators = [first[declarator - 1 :], *parts[1:]]
        result = ""
        for tokens in declarators:
            name = tokens[0].text
            dimensions = self.text[tokens[0].end : tokens[-1].end]
            self.variables += 1
            result += (
                f"typedef {kind} {name}_type{dimensions}; {name}_type& {name} = "
                f'simulator::variable<{name}_type, {self.variables}>("{name}"); '
            )
        self.edit(keyword, end, result)
        return end

    def edited(self) -> str:
        """The text with all edits made; line breaks stay where they were."""
        result, position = [], 0
        for edit in sorted(self.edits, key=lambda edit: edit.start):
            breaks = "\n" * self.text.count("\n", edit.start, edit.end)
            result += [self.text[position : edit.start], " ".join(edit.text.split()), breaks]
            position = edit.end
        return "".join([*result, self.text[position:]])

    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel with a host name: plain functions and instantiated templates."""
        result = [
            Kernel(declaration.host_name, declaration.name, declaration.arguments)
            for declaration in self.declarations.values()
            if not declaration.template
        ]
        for host_name, function in self.instantiations:
            name = function.split("<", 1)[0].split("::")[-1].strip()
            if name not in self.declarations:
                raise SourceError(f"'{host_name}' instantiates '{name}', which is no kernel")
            result.append(Kernel(host_name, function, self.declarations[name].arguments))
        names = [kernel.host_name for kernel in result]
        for name in names:
            if names.count(name) > 1:
                raise SourceError(f"two kernels have the host name '{name}'")
        return tuple(result)


def named_indices(number: int, kernel: Kernel) -> dict[str, str]:
    """Indices of which only the kernels' translation unit knows the values, by their symbols."""
    return {
        f"simulator_index_{number}_{argument.index}": argument.index
        for argument in kernel.arguments
        if argument.space and not argument.index.isdigit()
    }


def wrapper(number: int, kernel: Kernel) -> str:
    """The function that calls a kernel with its arguments taken from the thread's bindings."""
    values = []
    for argument in kernel.arguments:
        if argument.built_in:
            values.append(BUILT_INS[argument.built_in])
            continue
        kind = argument.space.capitalize() + ("Reference" if argument.reference else "")
        where = "threadgroup_memory" if argument.space == "threadgroup" else "buffers"
        values.append(f"simulator::{kind}{{&t->{where}[{argument.index}]}}")
    call = ",\n      ".join(values)
    indices = [
        f'extern __constant uint {symbol} __asm__("{symbol}");\n'
        f"__constant uint {symbol} = {index};\n"
        for symbol, index in named_indices(number, kernel).items()
    ]
    return "".join(
        [
            *indices,
            f'extern "C" void simulator_kernel_{number}(const SimulatorThread* t) {{\n',
            f"  {kernel.function}(\n      {call});\n}}\n",
        ]
    )


def table(kernels: tuple[Kernel, ...], constants: list[str], instrumented: bool) -> str:
    """The translation unit from which the executor knows the library."""
    numbers = {constant: i for i, constant in enumerate(constants)}
    lines = ['#include "executor.h"', 'extern "C" {']
    for i in range(len(constants)):
        symbol = f"simulator_function_constant_{i}"
        lines += [
            f"extern char {symbol}[];",
            f"extern bool {symbol}_defined;",
            f"extern const uint32_t {symbol}_bytes;",
            f"extern const uint32_t {symbol}_index;",
        ]
    rows = []
    for i, kernel in enumerate(kernels):
        memory = [argument for argument in kernel.arguments if argument.space]
        lines.append(f"void simulator_kernel_{i}(const SimulatorThread*);")
        symbols = {index: symbol for symbol, index in named_indices(i, kernel).items()}
        lines += [f"extern const uint32_t {symbol};" for symbol in symbols.values()]
        lines.append(f"static const SimulatorParameter parameters_{i}[] = {{")
        for argument in memory:
            enabled = "nullptr"
            if argument.enabled:
                if argument.enabled not in numbers:
                    raise SourceError(f"'{argument.enabled}' is no function constant")
                number = numbers[argument.enabled]
                enabled = f"reinterpret_cast<const bool*>(simulator_function_constant_{number})"
            index = symbols.get(argument.index, argument.index)
            read_only = "true" if argument.read_only else "false"
            row = f'"{argument.name}", {SPACES[argument.space]}, {index}, {read_only}, {enabled}'
            lines.append(f"  {{{row}}},")
        lines.append("  {nullptr, kSimulatorDevice, 0, false, nullptr}};")
        rows.append(
            f"  {{{json.dumps(kernel.host_name)}, simulator_kernel_{i}, parameters_{i}, "
            f"{len(memory)}}},"
        )
    lines += [
        "const SimulatorKernel simulator_kernels[] = {",
        *rows,
        "  {nullptr, nullptr, nullptr, 0}};",
        f"const uint32_t simulator_kernel_count = {len(kernels)};",
        "const SimulatorFunctionConstant simulator_function_constants[] = {",
    ]
    for i, constant in enumerate(constants):
        symbol = f"simulator_function_constant_{i}"
        lines.append(
            f'  {{"{constant}", {symbol}_index, {symbol}, &{symbol}_defined, &{symbol}_bytes}},'
        )
    lines += [
        "  {nullptr, 0, nullptr, nullptr, nullptr}};",
        f"const uint32_t simulator_function_constant_count = {len(constants)};",
        f"const uint32_t simulator_is_instrumented = {int(instrumented)};",
        "}",
    ]
    return "\n".join(lines) + "\n"


def translate(preprocessed: str, *, instrumented: bool) -> Translation:
    """Translates the output of the preprocessor, Metal's keywords not yet replaced in it."""
    reader = Reader(preprocessed)
    kernels = reader.kernels()
    wrappers = "\n".join(wrapper(i, kernel) for i, kernel in enumerate(kernels))
    return Translation(
        kernels_source=f'{reader.edited()}\n# 1 "wrappers"\n{wrappers}',
        table_source=table(kernels, reader.function_constants, instrumented),
        kernels=kernels,
    )
