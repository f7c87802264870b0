"""The shaders keep to the Metal that every supported system compiles (metal_language.py).

Every ban is tried on a planted violation and on a clean variant of the same code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mlx_welford._ext as ext
import pytest
from metal_language import ALLOWED, Violation, Vocabulary, check
from simulator.oracle.metallib import INCLUDE, fetch_wheel, pinned_version

ROOT = Path(__file__).resolve().parents[2]
HEADERS = "mlx/backend/metal/kernels"

# What the planted snippets begin with.
PROLOGUE = """#include <metal_stdlib>
using namespace metal;
"""

# What stands for MLX's kernels where their names do not matter.
VOCABULARY = Vocabulary.of_text(
    PROLOGUE
    + """
#define MLX_MACRO 1
template <typename T>
[[kernel]] void sample(const device T* x [[buffer(0)]], device float* y [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  const float a = metal::precise::rsqrt(as_type<float>(uint(x[i])));
  y[i] = simd_shuffle_xor(a, ushort(1));
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
"""
)


@dataclass(frozen=True)
class Planted:
    """A violation of `rule` in the line that holds `mark`, and the same without it."""

    rule: str
    mark: str
    bad: str
    good: str


def kernel(body: str) -> str:
    """A kernel of that body, in a line of its own each."""
    return (
        "[[kernel]] void sample(const device float* x [[buffer(0)]],\n"
        "                       device float* y [[buffer(1)]],\n"
        "                       uint i [[thread_position_in_grid]]) {\n"
        f"{body}\n}}\n"
    )


PLANTED = {
    "double": Planted(
        "double", "d =", kernel("double d = x[i]; y[i] = d;"), kernel("float d = x[i]; y[i] = d;")
    ),
    "literal": Planted(
        "unsuffixed floating literal",
        "1.5",
        kernel("y[i] = 1.5 * x[i];"),
        kernel("y[i] = 1.5f * x[i];"),
    ),
    "literal with an exponent": Planted(
        "unsuffixed floating literal",
        "1e",
        kernel("y[i] = x[i] + float(1e-3);"),
        kernel("y[i] = x[i] + 1e-3f;"),
    ),
    "recursion": Planted(
        "recursion",
        "int f",
        "inline int f(int n) { return n == 0 ? 0 : f(n - 1); }\n" + kernel("y[i] = f(3);"),
        "inline int f(int n) { return n == 0 ? 0 : n - 1; }\n" + kernel("y[i] = f(3);"),
    ),
    "recursion of two templates": Planted(
        "recursion",
        "T g",
        "template <typename T> inline T g(T n);\n"
        "template <typename T> inline T f(T n) { return g<T>(n); }\n"
        "template <typename T> inline T g(T n) { return f<T>(n - 1); }\n" + kernel("y[i] = f(3);"),
        "template <typename T> inline T g(T n);\n"
        "template <typename T> inline T f(T n) { return g<T>(n); }\n"
        "template <typename T> inline T g(T n) { return n - 1; }\n" + kernel("y[i] = f(3);"),
    ),
    "lambda": Planted(
        "lambda",
        "[](",
        kernel("auto f = [](float v) { return v; };\ny[i] = f(x[i]);"),
        kernel("y[i] = x[i];"),
    ),
    "function pointer": Planted(
        "function pointer",
        "(*f)",
        "inline float one(float v) { return v; }\n"
        + kernel("float (*f)(float) = &one;\ny[i] = f(x[i]);"),
        "inline float one(float v) { return v; }\n" + kernel("y[i] = one(x[i]);"),
    ),
    "function pointer type": Planted(
        "function pointer",
        "(*F)",
        "typedef float (*F)(float);\n" + kernel("y[i] = x[i];"),
        "typedef float F;\n" + kernel("y[i] = x[i];"),
    ),
    "static local": Planted(
        "static local",
        "static",
        kernel("static int n = 0;\ny[i] = n;"),
        kernel("int n = 0;\ny[i] = n;"),
    ),
    "virtual": Planted(
        "virtual function",
        "virtual",
        "struct S { virtual float f() thread { return 1.0f; } };\n" + kernel("y[i] = x[i];"),
        "struct S { float f() thread { return 1.0f; } };\n" + kernel("S s; y[i] = s.f();"),
    ),
    "throw": Planted("exception", "throw", kernel("if (i > 3) throw 1;"), kernel("y[i] = 1.0f;")),
    "try": Planted(
        "exception",
        "try",
        kernel("try { y[i] = 1.0f; }\ncatch (...) { }"),
        kernel("{ y[i] = 1.0f; }"),
    ),
    "new": Planted(
        "new or delete",
        "new",
        kernel("thread int* p = new int(3);\ny[i] = *p;"),
        kernel("int v = 3; thread int* p = &v;\ny[i] = *p;"),
    ),
    "delete": Planted(
        "new or delete",
        "delete",
        kernel("int v = 3; thread int* p = &v;\ndelete p;"),
        kernel("int v = 3; thread int* p = &v;\ny[i] = *p;"),
    ),
    "std": Planted(
        "std::", "std", kernel("y[i] = std::min(x[i], 1.0f);"), kernel("y[i] = min(x[i], 1.0f);")
    ),
    "pointer parameter": Planted(
        "no address space",
        "get",
        "inline float get(const float* p) { return *p; }\n"
        + kernel("float v = 1; y[i] = get(&v);"),
        "inline float get(const thread float* p) { return *p; }\n"
        + kernel("float v = 1; y[i] = get(&v);"),
    ),
    "reference parameter of a template": Planted(
        "no address space",
        "get",
        "template <typename T> inline float get(const T& v) { return v; }\n"
        + kernel("float v = 1; y[i] = get(v);"),
        "template <typename T> inline float get(const thread T& v) { return v; }\n"
        + kernel("float v = 1; y[i] = get(v);"),
    ),
    "pointer to a pointer": Planted(
        "no address space",
        "get",
        "inline float get(thread float** p) { return **p; }\n" + kernel("y[i] = 1.0f;"),
        "inline float get(thread float* thread* p) { return **p; }\n" + kernel("y[i] = 1.0f;"),
    ),
    "result": Planted(
        "no address space",
        "same",
        "inline float* same(thread float* p) { return p; }\n"
        + kernel("float v = 1; y[i] = *same(&v);"),
        "inline thread float* same(thread float* p) { return p; }\n"
        + kernel("float v = 1; y[i] = *same(&v);"),
    ),
    "pointer variable": Planted(
        "no address space",
        "p =",
        kernel("float v = 1;\nfloat* p = &v;\ny[i] = *p;"),
        kernel("float v = 1;\nthread float* p = &v;\ny[i] = *p;"),
    ),
    "pointer member": Planted(
        "no address space",
        "float* p",
        "struct S { float* p; };\n" + kernel("y[i] = 1.0f;"),
        "struct S { thread float* p; };\n" + kernel("y[i] = 1.0f;"),
    ),
    "cast": Planted(
        "no address space",
        "uint*",
        kernel("float v = 1;\ny[i] = *((uint*)&v);"),
        kernel("float v = 1;\ny[i] = *((thread uint*)&v);"),
    ),
    "address spaces mixed": Planted(
        "does not compile",
        "p = x",
        kernel("const thread float* p = x;\ny[i] = *p;"),
        kernel("const device float* p = x;\ny[i] = *p;"),
    ),
    "writable program-scope variable": Planted(
        "program-scope variable",
        "total",
        "int total = 0;\n" + kernel("y[i] = total;"),
        "constant int total = 0;\n" + kernel("y[i] = total;"),
    ),
    "constant without its address space": Planted(
        "program-scope variable",
        "total",
        "constexpr int total = 1;\n" + kernel("y[i] = total;"),
        "constant constexpr int total = 1;\n" + kernel("y[i] = total;"),
    ),
    "float to bfloat": Planted(
        "implicit narrowing",
        "b =",
        kernel("bfloat b = x[i];\ny[i] = float(b);"),
        kernel("bfloat b = bfloat(x[i]);\ny[i] = float(b);"),
    ),
    "float to half in a template": Planted(
        "implicit narrowing",
        "return",
        "template <typename T> inline T cast(float v) {\n  return v;\n}\n"
        + kernel("y[i] = float(cast<half>(x[i]));"),
        "template <typename T> inline T cast(float v) {\n  return T(v);\n}\n"
        + kernel("y[i] = float(cast<half>(x[i]));"),
    ),
    "float added to half": Planted(
        "implicit narrowing",
        "+=",
        kernel("half h = half(x[i]);\nh += 1.0f;\ny[i] = float(h);"),
        kernel("half h = half(x[i]);\nh += half(1.0f);\ny[i] = float(h);"),
    ),
    "shuffle of long": Planted(
        "64-bit simd operation",
        "shuffle",
        kernel("const long v = i;\ny[i] = float(simd_shuffle_xor(v, ushort(1)));"),
        kernel("const int v = int(i);\ny[i] = float(simd_shuffle_xor(v, ushort(1)));"),
    ),
    "sum of ulong": Planted(
        "64-bit simd operation",
        "simd_sum",
        kernel("const ulong v = i;\ny[i] = float(simd_sum(v));"),
        kernel("const uint v = i;\ny[i] = float(simd_sum(v));"),
    ),
    "atomic ulong": Planted(
        "64-bit atomic",
        "atomic",
        "inline void add(device atomic<ulong>* p) {\n"
        "  atomic_fetch_add_explicit(p, 1ul, memory_order_relaxed);\n}\n" + kernel("y[i] = 1.0f;"),
        "inline void add(device atomic<uint>* p) {\n"
        "  atomic_fetch_add_explicit(p, 1u, memory_order_relaxed);\n}\n" + kernel("y[i] = 1.0f;"),
    ),
    "non-ASCII": Planted(
        "non-ASCII source",
        "\N{MULTIPLICATION SIGN}",
        kernel("y[i] = 2.0f * x[i];  // 2 \N{MULTIPLICATION SIGN} x"),
        kernel("y[i] = 2.0f * x[i];  // 2 * x"),
    ),
    "bfloat16_t": Planted(
        "name clash",
        "bfloat16_t",
        "typedef bfloat bfloat16_t;\n" + kernel("y[i] = float(bfloat16_t(x[i]));"),
        "typedef bfloat Short;\n" + kernel("y[i] = float(Short(x[i]));"),
    ),
    "member function": Planted(
        "member function without thread",
        "get",
        "struct S {\n  float v;\n  float get() const { return v; }\n};\n" + kernel("y[i] = 1.0f;"),
        "struct S {\n  float v;\n  float get() const thread { return v; }\n"
        "  static float of(S s) { return s.v; }\n};\n" + kernel("y[i] = 1.0f;"),
    ),
    "name of the library": Planted(
        "name clash",
        "normalize",
        "inline float normalize(float v, float s) { return v * s; }\n"
        + kernel("y[i] = normalize(x[i], 2.0f);"),
        "inline float scale(float v, float s) { return v * s; }\n"
        + kernel("y[i] = scale(x[i], 2.0f);"),
    ),
    "goto": Planted(
        "goto", "goto", kernel("goto end;\nend: y[i] = 1.0f;"), kernel("end: y[i] = 1.0f;")
    ),
}


# Names that the snippets declare. In a text of all of them each gets names of its own.
DECLARED = re.compile(r"\b(?:sample|f|g|F|S|get|one|same|cast|add|total|Short|scale)\b")


@cache
def checked_together(texts: tuple[str, ...]) -> list[list[Violation]]:
    """What is found in each of several snippets, with the lines that it has behind the prologue.

    They are compiled as one text, which takes hardly longer than one of them alone.
    """
    own_names = [DECLARED.sub(rf"\g<0>_{i}", text) for i, text in enumerate(texts)]
    found = check(PROLOGUE + "".join(own_names))
    first = 1 + len(PROLOGUE.splitlines())
    result, begin = [], first
    for text in own_names:
        end = begin + len(text.splitlines())
        inside = [v for v in found if v.file == "source" and begin <= v.line < end]
        result.append([replace(v, line=v.line - begin + first) for v in inside])
        begin = end
    assert sum(map(len, result)) == len(found), "a violation lies in no snippet"
    return result


def planted_texts(which: str) -> tuple[str, ...]:
    return tuple(getattr(planted, which) for planted in PLANTED.values())


def lines_with(text: str, mark: str) -> set[int]:
    return {number for number, line in enumerate(text.splitlines(), 1) if mark in line}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_named_with_its_line(name: str) -> None:
    planted, position = PLANTED[name], list(PLANTED).index(name)
    found = {(v.rule, v.line) for v in checked_together(planted_texts("bad"))[position]}
    expected = {(planted.rule, line) for line in lines_with(PROLOGUE + planted.bad, planted.mark)}
    assert expected, "the mark is in no line"
    assert found & expected, found
    assert not checked_together(planted_texts("good"))[position]


def test_one_snippet_is_checked_as_several_are() -> None:
    """What stands beside a snippet neither hides what is wrong with it nor adds to it."""
    for name in ("recursion", "address spaces mixed", "float to half in a template"):
        position = list(PLANTED).index(name)
        alone = checked_together((PLANTED[name].bad,))[0]
        among = checked_together(planted_texts("bad"))[position]
        assert [(v.rule, v.line) for v in alone] == [(v.rule, v.line) for v in among]


def test_names_of_metal_must_be_in_scope() -> None:
    struct = "struct Index {\n  uint2 i;\n};\n"
    (found,) = check(f"#include <metal_stdlib>\n{struct}using namespace metal;\n")
    assert (found.rule, found.line) == ("name not in scope", 3)
    assert not check(f"#include <metal_stdlib>\n{struct.replace('uint2', 'metal::uint2')}")
    assert not check(PROLOGUE + struct)


SAMPLE = "  const float a = metal::precise::rsqrt(x[i]);\n  y[i] = a;"


@pytest.mark.parametrize(
    ("source", "line", "detail"),
    [
        (kernel(SAMPLE.replace("rsqrt", "sinpi")), 6, "the word 'sinpi'"),
        (kernel(SAMPLE + "\nthreadgroup_barrier(mem_flags::mem_texture);"), 8, "'mem_texture'"),
        (kernel(SAMPLE).replace("thread_position_in_grid", "thread_index_in_threadgroup"), 5, "[["),
        (kernel(SAMPLE + "\ny[i] = as_type<half>(ushort(i));"), 8, "as_type<half>"),
        (kernel(SAMPLE + "\nwhile (y[i] > 0.0f) y[i] -= 1.0f;"), 8, "the word 'while'"),
    ],
    ids=["function", "flag", "attribute", "as_type", "keyword"],
)
def test_what_the_vocabulary_lacks_is_named_with_its_line(
    source: str, line: int, detail: str
) -> None:
    found = check(PROLOGUE + source, vocabulary=VOCABULARY)
    assert {v.rule for v in found} == {"not in MLX's kernels"}
    assert any(v.line == line and detail in v.detail for v in found), found


def test_what_the_vocabulary_has_is_allowed() -> None:
    assert not check(PROLOGUE + kernel(SAMPLE), vocabulary=VOCABULARY)


def test_a_macro_of_mlx_is_no_name() -> None:
    source = PROLOGUE + kernel("  const float MLX_MACRO = x[i];\n  y[i] = MLX_MACRO;")
    assert {(v.rule, v.line) for v in check(source, vocabulary=VOCABULARY)} == {
        ("name clash", 6),
        ("name clash", 7),
    }


def test_comments_are_no_vocabulary() -> None:
    text = "/* alpha */ int beta; // gamma\n#define DELTA epsilon\n// [[zeta]] as_type<half>(x)\n"
    vocabulary = Vocabulary.of_text(text)
    assert vocabulary.words == {"int", "beta", "DELTA", "epsilon"}
    assert vocabulary.macros == {"DELTA"}
    assert not vocabulary.attributes
    assert not vocabulary.bit_casts


def instantiations() -> list[str]:
    """What a host appends to the shaders for all kernels that it can ask for."""
    return [text for _, text in ext.shader_kernels() if text]


def described(found: list[Violation]) -> list[str]:
    """With the lines of the shaders, whose numbers are those of all of metal/ in one text."""
    lines = ["", *ext.shader_source.splitlines()]
    return [f"{v}  |  {lines[v.line].strip() if v.file == 'source' else ''}" for v in found]


def test_the_shaders_break_no_rule() -> None:
    assert described(check(ext.shader_source, instantiations())) == []


@pytest.mark.slow
def test_the_shaders_use_only_what_mlx_uses() -> None:
    """Downloads MLX's macOS wheel, unless another test has."""
    wheel = fetch_wheel(pinned_version(ROOT / "pyproject.toml"), ROOT / "build" / "oracle")
    vocabulary = Vocabulary.of_headers(wheel / INCLUDE / HEADERS)
    assert not ALLOWED.keys() & vocabulary.words  # these need no permission
    assert described(check(ext.shader_source, instantiations(), vocabulary)) == []
