"""The shaders in LLVM's intermediate representation: what a compiler can keep in registers.

Made by the simulator's clang for a target without a machine, everything inlined: what Apple's
compiler starts from is like it, and what no optimisation removes here may stay there, too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cuda_twin.source import enumerators, index_of
from simulator import loader
from simulator.source import translate

TARGET = ["--target=spir64-unknown-unknown", "-O2", "-mllvm", "-inline-threshold=1000000"]


@dataclass
class Function:
    """A kernel's instructions, and the arrays of a thread's own that it keeps in memory."""

    instructions: int = 0
    branches: int = 0  # with a condition, among them
    divisions: int = 0  # of floats
    arrays: list[str] = field(default_factory=list)


def specialized(text: str, constants: Mapping[int, int]) -> str:
    """Preprocessed Metal source with values for its function constants, 0 if there is none.

    They become constants of the program, as in the pipelines of Apple's compiler.
    """
    names = enumerators(text)

    def declaration(match: re.Match[str]) -> str:
        value = int(constants.get(index_of(match["index"], names), 0))
        return f"{match['declared']} = {value};"

    return re.sub(
        r"(?P<declared>\bconstant \w+ \w+) \[\[function_constant\((?P<index>\w+)\)\]\];",
        declaration,
        text,
    )


def functions(
    source: str, instantiations: list[str], constants: Mapping[int, int] | None = None
) -> dict[str, Function]:
    """The kernels that `instantiations` make of Metal source, by their mangled names."""
    text = specialized(loader.preprocess(source, instantiations), constants or {})
    kernels = translate(text, instrumented=False).kernels_source.partition('# 1 "wrappers"')[0]
    named = {match for line in instantiations for match in re.findall(r"decltype\((.*?)\) ", line)}
    kernels += "".join(f"template decltype({name}) {name};\n" for name in sorted(named))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cpp"
        path.write_text(kernels)
        command = [*loader._zig(), "clang", *loader.LANGUAGE, *loader.KEYWORDS, *TARGET]
        ir = loader._run([*command, "-S", "-emit-llvm", str(path), "-o", "-"]).stdout
    return parsed(ir)


def parsed(ir: str) -> dict[str, Function]:
    """The functions of a module in text form."""
    found: dict[str, Function] = {}
    current: Function | None = None
    for line in ir.splitlines():
        if start := re.match(r"define .*@(\S+?)\(", line):
            current = found[start[1]] = Function()
        elif line.startswith("}"):
            current = None
        elif current is not None and line.startswith("  "):
            current.instructions += 1
            current.branches += line.startswith("  br i1 ")
            current.divisions += " = fdiv " in line
            # A single number is what the stand-in of a shuffle takes the address of
            if array := re.search(r" = alloca ([\[%].*?), align", line):
                current.arrays.append(array[1])
    return found
