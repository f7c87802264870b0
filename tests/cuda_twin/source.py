"""Turns Metal source into CUDA C++ that NVRTC compiles, and says how its kernels are called.

The kernels' code stays as it is written. Changed are only words that CUDA lacks: ``threadgroup`` in
front of a variable becomes ``__shared__``, ``constant`` in front of one ``__constant__``, the
pragma that unrolls a loop gets NVRTC's name, ``(device uint4*)`` names a type that is written 16
bytes at once, and ``template [[host_name("...")]] [[kernel]] ...;`` is taken out. A function
constant becomes a ``constexpr`` variable, as Apple's back end folds it when it makes a pipeline:
another value makes another program. For each kernel a ``__global__`` function of its host name is
added that calls it: the buffers are its parameters, in the order in which the kernel declares them,
references by value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulator.source import (
    Argument,
    Kernel,
    Reader,
    SourceError,
    attributes,
    statement_end,
)

# A built-in argument as an expression in the stand-in's namespace cuda_twin.
BUILT_INS = {
    "thread_position_in_grid": "position_in_grid()",
    "thread_position_in_threadgroup": "position()",
    "threadgroup_position_in_grid": "group()",
    "threads_per_threadgroup": "size()",
    "dispatch_threads_per_threadgroup": "size()",
    "threadgroups_per_grid": "groups()",
    "threads_per_grid": "threads_per_grid()",
    "thread_index_in_threadgroup": "thread_index()",
    "thread_index_in_simdgroup": "thread_index() % 32",
    "simdgroup_index_in_threadgroup": "thread_index() / 32",
    "simdgroups_per_threadgroup": "simdgroups()",
    "dispatch_simdgroups_per_threadgroup": "simdgroups()",
    "threads_per_simdgroup": "Index{32, 1, 1}",
    "thread_execution_width": "Index{32, 1, 1}",
}

# Clang's, and Apple's, words for what NVRTC calls `unroll`.
UNROLL = '_Pragma("clang loop unroll(full)")'


@dataclass(frozen=True)
class Parameter:
    """What a kernel is launched with, in its place: a buffer's address, or bytes by value."""

    name: str
    index: int
    by_value: bool
    read_only: bool


@dataclass(frozen=True)
class Translation:
    """CUDA C++, and the kernels in it with their parameters."""

    text: str
    kernels: dict[str, tuple[Parameter, ...]]


class CudaReader(Reader):
    """The simulator's reader, with CUDA's words for variables.

    Args:
        text: Metal source.
        names: Its enumerators, for indices that are named.
        constants: The values of function constants by their index; 0 if there is none.
    """

    def __init__(self, text: str, names: Mapping[str, int], constants: Mapping[int, int]) -> None:
        self.names = names
        self.constants = constants
        super().__init__(text)

    def read_threadgroup_variable(self, statement: int, keyword: int) -> int:
        self.edit(keyword, keyword, "__shared__")
        return statement_end(self.tokens, keyword)

    def read_constant(self, statement: int, keyword: int, after_name: int) -> int:
        end = statement_end(self.tokens, statement)
        index = dict(attributes(self.tokens[statement:end])).get("function_constant")
        if index is None:
            self.edit(keyword, keyword, "__constant__")
            return keyword
        kind_and_name = self.text_of(keyword + 1, after_name)
        value = int(self.constants.get(index_of(index, self.names), 0))
        self.edit(statement, end, f"constexpr {kind_and_name} = {value};")
        return end


def index_of(spelled: str, names: Mapping[str, int]) -> int:
    """An index that is a number or the name of an enumerator."""
    return int(spelled) if spelled.isdigit() else names[spelled]


def enumerators(source: str) -> dict[str, int]:
    """The values of all enumerators that are a number or follow one."""
    found: dict[str, int] = {}
    for body in re.findall(r"\benum\b[^{};]*\{([^}]*)\}", source):
        last = -1
        for item in filter(str.strip, body.split(",")):
            match = re.fullmatch(r"\s*(\w+)\s*(?:=\s*(\d+)\s*)?", item)
            if match is None:
                break  # an expression: neither this one nor those that follow are known
            last = int(match[2]) if match[2] else last + 1
            found[match[1]] = last
    return found


def parameters_of(kernel: Kernel, names: Mapping[str, int]) -> tuple[Parameter, ...]:
    """The parameters of a kernel that are memory."""
    parameters = []
    for argument in kernel.arguments:
        if not argument.space:
            continue
        if argument.space == "threadgroup" or argument.enabled:
            raise SourceError(f"kernel '{kernel.host_name}': the CUDA twin binds only buffers")
        if argument.reference and argument.space != "constant":
            raise SourceError(f"kernel '{kernel.host_name}': a reference to device memory")
        index = index_of(argument.index, names)
        parameters.append(Parameter(argument.name, index, argument.reference, argument.read_only))
    return tuple(parameters)


def wrapper(kernel: Kernel, bounds: str) -> str:
    """The ``__global__`` function that calls a kernel."""

    def declared(place: int, argument: Argument) -> str:
        kind = f"cuda_twin::Parameter<{place}, decltype({kernel.function})>::type"
        by_value = "const __grid_constant__ " if argument.reference else ""
        return f"{by_value}{kind} {argument.name}"

    parameters = [declared(i, a) for i, a in enumerate(kernel.arguments) if a.space]
    values = [
        argument.name if argument.space else f"cuda_twin::{BUILT_INS[argument.built_in]}"
        for argument in kernel.arguments
    ]
    return (
        f'extern "C" __global__ {bounds} void {kernel.host_name}({", ".join(parameters)}) {{\n'
        f"  {kernel.function}({', '.join(values)});\n}}\n"
    )


def translate(
    source: str,
    instantiations: Sequence[str],
    *,
    constants: Mapping[int, int] | None = None,
    registers: int | None = None,
) -> Translation:
    """Translates Metal source that no preprocessor has seen; its ``#include`` are left to NVRTC.

    ``constants``: the values of function constants by their index, 0 if there is none.
    ``registers``: what a thread may use at most, if not as many as the compiler wants.
    """
    plain = re.sub(r"//[^\n]*", "", source).replace(UNROLL, '_Pragma("unroll")')
    plain = plain.replace("((device uint4*)", "((cuda_twin::Device16*)")
    names = enumerators(plain)
    reader = CudaReader("\n".join([plain, *instantiations]), names, constants or {})
    kernels = reader.kernels()
    bounds = f"__maxnreg__({registers})" if registers else ""
    return Translation(
        "\n".join([reader.edited(), *(wrapper(kernel, bounds) for kernel in kernels)]),
        {kernel.host_name: parameters_of(kernel, names) for kernel in kernels},
    )
