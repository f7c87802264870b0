"""Translate kernels that Apple's compiler left as AIR (LLVM bitcode), and link them into a library.

AIR is LLVM IR with address spaces (1 device, 2 constant, 3 threadgroup), calls to ``air.*``
functions, and metadata that says which buffer or built-in each parameter is. What changes here is
the target, the kernel's name, the values of function constants (Metal too fills them in when it
builds a pipeline), and where threadgroup variables live: their addresses come from the executor,
which gives every threadgroup fresh, poisoned memory. The ``air.*`` functions stay external;
air_runtime.cpp defines them on the executor's primitives.

Fair because the instructions, their order, their rounding and the ``fmuladd`` contractions are the
ones Apple's front end and optimiser chose; no LLVM optimisation passes run over them, only
instruction selection. Not covered: Apple's GPU code generator, which comes after AIR, and with it
the accuracy of its transcendentals, the order in which hardware adds across lanes, and the GPU's
memory model.
"""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm

from ..loader import HEADERS, Library, check_system

DIRECTORY = Path(__file__).resolve().parent
SIMULATOR = DIRECTORY.parent

# The executor's function that gives a threadgroup variable its memory.
_VARIABLE = "simulator_threadgroup_variable"

# A matrix is a vector of 64 floats, of which the first two are a lane's own. LLVM passes such a
# vector in memory, in a way of its own: so it is done in the module, and pointers are passed on.
_MATRIX = "air.simdgroup_matrix_8x8_multiply_accumulate.v64f32.v64f32.v64f32.v64f32"
_MATRIX_BODY = f"""
define internal <64 x float> @{_MATRIX}(<64 x float> %a, <64 x float> %b, <64 x float> %c) {{
  %pa = alloca <64 x float>
  %pb = alloca <64 x float>
  %pc = alloca <64 x float>
  %pd = alloca <64 x float>
  store <64 x float> %a, ptr %pa
  store <64 x float> %b, ptr %pb
  store <64 x float> %c, ptr %pc
  store <64 x float> %c, ptr %pd
  call void @simulator_multiply_matrices(ptr %pa, ptr %pb, ptr %pc, ptr %pd)
  %d = load <64 x float>, ptr %pd
  ret <64 x float> %d
}}
declare void @simulator_multiply_matrices(ptr, ptr, ptr, ptr)
"""


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel, as its ``air.kernel`` metadata describes it."""

    name: str  # as in the Metal source
    type_name: str  # as in the Metal source, e.g. "float", "uint3"
    kind: str  # "buffer", or the built-in, e.g. "thread_index_in_simdgroup"
    location: int  # the buffer index; -1 for a built-in
    address_space: int  # 1 device, 2 constant, 3 threadgroup; 0 for a built-in
    writable: bool
    alignment: int  # of what a buffer holds, in bytes
    enabled: bool  # unless a function constant switches it off


@dataclass(frozen=True)
class Translation:
    """A kernel ready to link."""

    name: str
    arguments: tuple[Argument, ...]
    contracted: bool  # whether Apple's compiler marked products to be fused with sums
    object_code: bytes


def host_cpu() -> str:
    """The processor to generate code for: one with fused multiply-add, as contraction needs."""
    return "x86-64-v3" if platform.machine() in ("x86_64", "AMD64") else "generic"


def translate(bitcode: bytes, name: str, constants: Mapping[str, bool]) -> Translation:
    """Translate the only kernel of `bitcode` to an object file that defines it as `name`.

    constants: a value for each of the kernel's function constants, by name. Raises ValueError when
    they are not exactly those the kernel has.
    """
    text = _read(bitcode)
    metadata = _Metadata(text)
    found = {c.name: c for c in _function_constants(metadata)}
    if found.keys() != constants.keys():
        raise ValueError(f"function constants are {sorted(found)}, given {sorted(constants)}")
    values = {found[key].symbol: int(value) for key, value in constants.items()}
    return _translate(text, metadata, name, values)


def translate_by_index(bitcode: bytes, name: str, constants: Mapping[int, bytes]) -> Translation:
    """The same, with function constants as a pipeline is given them: bytes by index.

    A constant without a value is 0: Metal leaves it undefined, and the kernel must not use it.
    There is room in front of private arrays: in MLX's layer norm a thread whose elements all lie
    beyond the row fills its array from a negative index on, which on a GPU overwrites nothing.
    """
    text = _read(bitcode)
    metadata = _Metadata(text)
    values = {
        c.symbol: int.from_bytes(constants.get(c.index, b""), "little", signed=True)
        for c in _function_constants(metadata)
    }
    return _translate(_make_room(text), metadata, name, values)


def _make_room(text: str) -> str:
    """Put some memory in front of each array on the stack."""
    room = 1024  # 8 elements for each of 32 lanes
    bits = {"float": 32, "half": 16, "bfloat": 16} | {f"i{n}": n for n in (8, 16, 32, 64)}

    def widened(match: re.Match[str]) -> str:
        name, count, element, alignment = match.groups()
        size = room + int(count) * bits[element] // 8
        return (
            f"  %room.{name} = alloca [{size} x i8], align {alignment}\n"
            f"  %{name} = getelementptr i8, ptr %room.{name}, i64 {room}"
        )

    array = re.compile(rf"^  %(\w+) = alloca \[(\d+) x ({'|'.join(bits)})\], align (\d+)$", re.M)
    text, count = array.subn(widened, text)
    # Lifetimes are those of whole variables.
    return re.sub(r"^ .*call void @llvm\.lifetime\..*\n", "", text, flags=re.M) if count else text


def _read(bitcode: bytes) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return str(llvm.parse_bitcode(bitcode))


def _translate(
    text: str, metadata: _Metadata, name: str, constants: Mapping[str, int]
) -> Translation:
    by_name = {c.name: constants[c.symbol] for c in _function_constants(metadata)}
    kernel, arguments = _kernel(metadata, by_name)
    text = _set_function_constants(text, constants)
    text = _rename_kernel(text, kernel, name)
    text = re.sub(
        rf"^declare .* @{re.escape(_MATRIX)}\(.*$", lambda _: _MATRIX_BODY, text, flags=re.M
    )

    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=host_cpu(), opt=2, reloc="pic", codemodel="small"
    )
    module = llvm.parse_assembly(text)
    sizes = {
        g.name: machine.target_data.get_abi_size(g.global_value_type)
        for g in module.global_variables
    }
    module = llvm.parse_assembly(_add_entry(text, name, sizes))
    module.triple = triple
    module.data_layout = str(machine.target_data)
    module.verify()
    return Translation(
        name=name,
        arguments=arguments,
        contracted="@llvm.fmuladd." in text,
        object_code=machine.emit_object(module),
    )


class _Metadata:
    """The metadata of a module: nodes of operands, read from its printed form.

    llvmlite has no interface to metadata. An operand is a string, an int, or a reference: "!7" to
    a node, "@name" to a global.
    """

    _OPERAND = re.compile(
        r'\s*(?:!"(?P<text>(?:[^"\\]|\\.)*)"|(?P<node>!\d+)|i\d+ (?P<number>-?\w+)'
        r"|ptr(?: addrspace\(\d+\))? (?P<pointer>@[\w.$]+)|[^,]+)"
    )

    def __init__(self, text: str) -> None:
        self._lines = dict(
            re.findall(r"^(![\w.]+) = (?:distinct )?!\{(.*)\}$", text, re.M),
        )

    def node(self, name: str) -> list[str | int]:
        """The operands of node `name` ("!7", "!air.kernel"); empty if there is no such node."""
        operands: list[str | int] = []
        for match in self._OPERAND.finditer(self._lines.get(name, "")):
            number = match["number"]
            if number is not None:
                operands.append(int({"true": "1", "false": "0"}.get(number, number)))
            elif match["text"] is not None:
                operands.append(match["text"])
            else:
                operands.append(match["node"] or match["pointer"] or match[0].strip())
        return operands


def _kernel(metadata: _Metadata, constants: Mapping[str, int]) -> tuple[str, tuple[Argument, ...]]:
    """Name and parameters of the module's only kernel, given its function constants by name."""
    (entry,) = metadata.node("!air.kernel")
    function, _, parameters, *_ = metadata.node(str(entry))
    arguments = []
    for position, reference in enumerate(metadata.node(str(parameters))):
        fields = metadata.node(str(reference))
        if fields[0] != position:
            raise ValueError(f"parameter {position} of {function} is described as {fields}")
        enabled = True
        if fields[1] == "air.function_constant":
            condition = str(metadata.node(str(fields[2]))[2])
            if condition not in constants:
                raise ValueError(f"parameter {position} of {function} is there if {condition}")
            enabled = constants[condition] != 0
            fields = [position, *fields[3:]]
        kind = str(fields[1]).removeprefix("air.")
        location, space, alignment = -1, 0, 1
        if kind == "buffer":
            location = int(fields[fields.index("air.location_index") + 1])
            space = int(fields[fields.index("air.address_space") + 1])
            alignment = int(fields[fields.index("air.arg_type_align_size") + 1])
        arguments.append(
            Argument(
                name=str(fields[fields.index("air.arg_name") + 1]),
                type_name=str(fields[fields.index("air.arg_type_name") + 1]),
                kind=kind,
                location=location,
                address_space=space,
                writable="air.read_write" in fields or "air.write" in fields,
                alignment=alignment,
                enabled=enabled,
            )
        )
    return str(function).removeprefix("@"), tuple(arguments)


@dataclass(frozen=True)
class _FunctionConstant:
    symbol: str
    name: str
    index: int


def _function_constants(metadata: _Metadata) -> list[_FunctionConstant]:
    constants = []
    for reference in metadata.node("!air.function_constants"):
        symbol, type_name, name, index, *_ = metadata.node(str(reference))
        if type_name not in ("bool", "int", "uint", "short", "ushort"):
            raise ValueError(f"function constant {name} is of type {type_name}")
        constants.append(_FunctionConstant(str(symbol), str(name), int(index)))
    return constants


def _set_function_constants(text: str, constants: Mapping[str, int]) -> str:
    """Give function constants, by symbol, their values, as building a pipeline does."""
    for symbol, value in constants.items():
        declaration = re.compile(rf"^({re.escape(symbol)} = .*constant i\d+) undef,", re.M)
        text, count = declaration.subn(rf"\1 {value},", text)
        if count != 1:
            raise ValueError(f"function constant {symbol} is declared {count} times")
    return text


def _rename_kernel(text: str, kernel: str, name: str) -> str:
    """Call the kernel `name`, so that variants of one kernel can be linked together."""
    text = text.replace(f"define weak_odr void @{kernel}(", f"define void @{name}(")
    return re.sub(rf"@{re.escape(kernel)}(?![\w.$])", f"@{name}", text)


def _add_entry(text: str, name: str, sizes: Mapping[str, int]) -> str:
    """Have the kernel first do what Metal does for it before it starts.

    It runs the module's initialisers, which pass function constants on, and asks the executor where
    each threadgroup variable is: a variable `@v` becomes a value `%v` of the same type, an argument
    of the same instructions.
    """
    entry = []
    initialisers = re.search(r"^@llvm\.global_ctors = .*$", text, re.M)
    if initialisers is not None:
        text = text.replace(initialisers[0], "")
        entry = [f"  call void {f}()" for f in re.findall(r"ptr (@[\w.$]+)", initialisers[0])]
    sites = ""
    variables = re.findall(r"^@(\S+) = internal .*?addrspace\(3\) global", text, re.M)
    for i, variable in enumerate(variables):
        text = re.sub(rf"^@{re.escape(variable)} = .*$", "", text, flags=re.M)
        text = re.sub(rf"@{re.escape(variable)}(?![\w.$])", f"%{variable}", text)
        # The executor knows a variable by its site. Kernels never run at once and may share one.
        site = f"threadgroup.variable.{i}"
        sites += f'@{site} = linkonce_odr constant [{len(site) + 1} x i8] c"{site}\\00"\n'
        entry += [
            f"  %address.{i} = call ptr @{_VARIABLE}(ptr @{site}, ptr @{site},"
            f" i64 {sizes[variable]})",
            f"  %{variable} = addrspacecast ptr %address.{i} to ptr addrspace(3)",
        ]
    head = re.compile(rf"^define void @{re.escape(name)}\(.*\{{$", re.M)
    text, count = head.subn(lambda match: "\n".join([match[0], *entry]), text)
    if count != 1:
        raise ValueError(f"{name} is defined {count} times")
    return text + sites + f"declare ptr @{_VARIABLE}(ptr, ptr, i64)\n"


_SPACES = {1: "kSimulatorDevice", 2: "kSimulatorConstant", 3: "kSimulatorThreadgroup"}

# How a wrapper reads each built-in; three values where the built-in may be a vector.
_BUILT_INS = {
    "threadgroup_position_in_grid": "thread->threadgroup_position_in_grid[{}]",
    "thread_position_in_threadgroup": "thread->thread_position_in_threadgroup[{}]",
    "threads_per_threadgroup": "thread->threads_per_threadgroup[{}]",
    "threadgroups_per_grid": "thread->threadgroups_per_grid[{}]",
    "thread_position_in_grid": (
        "thread->threadgroup_position_in_grid[{0}] * thread->threads_per_threadgroup[{0}]"
        " + thread->thread_position_in_threadgroup[{0}]"
    ),
    "threads_per_grid": (
        "thread->threadgroups_per_grid[{0}] * thread->threads_per_threadgroup[{0}]"
    ),
    "thread_index_in_threadgroup": "thread->thread_index_in_threadgroup",
    "thread_index_in_simdgroup": "thread->thread_index_in_simdgroup",
    "threads_per_simdgroup": "uint(kSimulatorLanes)",
    "simdgroup_index_in_threadgroup": "thread->simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup": "thread->simdgroups_per_threadgroup",
}


def tables(translations: Sequence[Translation]) -> str:
    """C++ source of the tables and wrappers through which the executor finds the kernels."""
    lines = ['#include "executor.h"', "using uint = uint32_t;", "using ushort = uint16_t;"]
    lines += [
        f"using {scalar}{n} = {scalar} __attribute__((ext_vector_type({n})));"
        for scalar in ("uint", "ushort")
        for n in (2, 3)
    ]
    lines.append("alignas(16) static char nothing[4096];")
    kernels = []
    for t in translations:
        types, values, parameters = [], [], []
        for argument in t.arguments:
            if not argument.enabled:
                types.append("void*")
                values.append("nothing")  # may be read, if nothing comes of it
            elif argument.kind == "buffer":
                types.append("void*")
                memory = "threadgroup_memory" if argument.address_space == 3 else "buffers"
                values.append(f"thread->{memory}[{argument.location}].data")
                space = _SPACES[argument.address_space]
                read_only = "false" if argument.writable else "true"
                parameters.append(
                    f'{{"{argument.name}", {space}, {argument.location}, {read_only}, nullptr}}'
                )
            else:
                expression = _BUILT_INS[argument.kind]
                scalar, width = argument.type_name.rstrip("23"), argument.type_name[-1]
                width = width if width in "23" else ""
                types.append(argument.type_name)
                parts = [f"{scalar}({expression.format(i)})" for i in range(int(width or 1))]
                values.append(f"{argument.type_name}{{{', '.join(parts)}}}" if width else parts[0])
        lines += [
            f'extern "C" void {t.name}({", ".join(types)});',
            f"static void run_{t.name}(const SimulatorThread* thread) {{",
            f"  {t.name}({', '.join(values)});",
            "}",
            f"static const SimulatorParameter parameters_{t.name}[] = {{{', '.join(parameters)}}};",
        ]
        kernels.append(f'{{"{t.name}", run_{t.name}, parameters_{t.name}, {len(parameters)}}},')
    lines += [
        "extern const SimulatorKernel simulator_kernels[] = {",
        *kernels,
        "};",
        f"extern const uint32_t simulator_kernel_count = {len(kernels)};",
        "extern const SimulatorFunctionConstant simulator_function_constants[] = {{}};",
        "extern const uint32_t simulator_function_constant_count = 0;",
        "extern const uint32_t simulator_is_instrumented = 0;",
    ]
    return "\n".join(lines) + "\n"


def link(translations: Sequence[Translation], cache: Path) -> Library:
    """Link kernels with the air.* functions and the executor; kept in `cache` by content.

    Raises SkipTest in other systems than Linux.
    """
    check_system()
    sources = [DIRECTORY / "air_runtime.cpp", SIMULATOR / "executor.cpp"]
    table = tables(translations)
    digest = hashlib.sha256(table.encode())
    for source in [*sources, *HEADERS]:
        digest.update(source.read_bytes())
    for translation in translations:
        digest.update(translation.object_code)
    path = cache / f"{digest.hexdigest()[:32]}.so"
    if path.exists():
        return Library(path)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        (folder / "table.cpp").write_text(table)
        objects = [folder / f"{i}.o" for i in range(len(translations))]
        for file, translation in zip(objects, translations, strict=True):
            file.write_bytes(translation.object_code)
        command = [sys.executable, "-m", "ziglang", "c++", "-std=c++20", "-O2", "-fPIC", "-shared"]
        command += ["-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-nostdlib++"]
        command += ["-Wl,-Bsymbolic", f"-I{SIMULATOR}"]
        if host_cpu() != "generic":
            command.append("-march=" + host_cpu().replace("-", "_"))  # as zig spells it
        command += [str(file) for file in [*sources, folder / "table.cpp", *objects]]
        done = subprocess.run(
            [*command, "-o", str(folder / "library.so")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"could not link Apple's kernels:\n{done.stderr}")
        (folder / "library.so").replace(path)
    return Library(path)
