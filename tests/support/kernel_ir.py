"""The shaders in LLVM's intermediate representation: what a compiler can keep in registers.

Made by the simulator's clang for a target without a machine, everything inlined: what Apple's
compiler starts from is like it, and what no optimisation removes here may stay there, too.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from simulator import loader
from simulator.source import translate

TARGET = ["--target=spir64-unknown-unknown", "-O2", "-mllvm", "-inline-threshold=1000000"]


@dataclass
class Function:
    """A kernel's instructions, and the arrays of a thread's own that it keeps in memory."""

    instructions: int = 0
    divisions: int = 0  # of floats, among them
    arrays: list[str] = field(default_factory=list)


def functions(source: str, instantiations: list[str]) -> dict[str, Function]:
    """The kernels that `instantiations` make of Metal source, by their mangled names."""
    text = loader.preprocess(source, instantiations)
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
            current.divisions += " = fdiv " in line
            # A single number is what the stand-in of a shuffle takes the address of
            if array := re.search(r" = alloca ([\[%].*?), align", line):
                current.arrays.append(array[1])
    return found
