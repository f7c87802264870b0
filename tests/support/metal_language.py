"""A strict reading of Metal source: what Apple's compiler refuses, or may one day refuse.

    vocabulary = Vocabulary.of_headers(directory_of_mlx_kernels)
    for violation in check(source, instantiations, vocabulary):
        print(violation)

Most rules read clang's syntax tree of the source, with every template that it instantiates: the
simulator's reader and its stand-in for ``metal_stdlib`` make C++ for OpenCL of it, in which every
type says its address space. What a tree does not keep is read from the tokens that are left after
preprocessing: reserved words, attributes, and whether a name of Metal's is in scope yet.

On top of the bans, a vocabulary: a keyword, attribute, or name that the source does not declare
itself must occur in the kernels that MLX ships, since those are known to compile in every version
of Metal that MLX supports. ALLOWED lists what goes beyond it.

Not covered: that a construct means the same on a GPU, and whatever Apple's compiler refuses for
reasons of its own, such as registers or time.
"""

from __future__ import annotations

import bisect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator import loader
from simulator.source import (
    TOKEN,
    SourceError,
    Token,
    attributes,
    closing_index,
    tokenise,
    translate,
)

Node = dict[str, Any]

# The file names of loader.preprocess for what is to be checked.
CHECKED = ("source", "instantiations")

# Reserved words of C++ that Metal refuses, or that have no business in a kernel.
BANNED_WORDS = {
    "double": "double",
    "virtual": "virtual function",
    "throw": "exception",
    "try": "exception",
    "catch": "exception",
    "noexcept": "exception",
    "new": "new or delete",
    "delete": "new or delete",
    "dynamic_cast": "run-time type information",
    "typeid": "run-time type information",
    "goto": "goto",
    "asm": "assembly",
    "thread_local": "static local",
}

# Names that Metal or its later versions give a meaning, with the version where it is known.
TAKEN = {
    "bfloat16_t": "a type of Metal's own from 4.1 on",
    "coherent": "a qualifier from 3.2 on",
    "tensor": "a type from 4.0 on",
    "cooperative_tensor": "a type from 4.0 on",
    "extents": "a type from 4.0 on",
    "dextents": "a type from 4.0 on",
    "ray_data": "an address space",
    "object_data": "an address space",
    "threadgroup_imageblock": "an address space",
    "quadgroup": "reserved",
    "simdgroup": "reserved",
    "fragment": "a keyword",
    "vertex": "a keyword",
    "visible": "a keyword",
    "stitchable": "a keyword",
    "sampler": "a type",
    "patch": "a type",
}

# Functions of metal:: (Metal Shading Language Specification, chapter 6), which share a scope with
# those of the source after `using namespace metal`. A template of the same name makes
# `decltype(f<float, 4>)` depend on how Apple declared its own.
LIBRARY = """
    abs absdiff acos acosh addsat all any asin asinh atan atan2 atanh ceil clamp clz copysign
    cos cosh cospi cross ctz determinant distance distance_squared divide dot exp exp10 exp2
    extract_bits fabs faceforward fdim floor fma fmax fmax3 fmedian3 fmin fmin3 fmod fract frexp
    hadd ilogb insert_bits isfinite isinf isnan isnormal isordered isunordered ldexp length
    length_squared log log10 log2 mad24 madhi madsat max max3 median3 min min3 mix modf mul24
    mulhi nextafter normalize popcount pow powr reflect refract reverse_bits rhadd rint rotate
    round rsqrt saturate select sign signbit sin sincos sinh sinpi smoothstep sqrt step subsat
    tan tanh tanpi transpose trunc
"""
LIBRARY_FUNCTIONS = frozenset(LIBRARY.split())

# Types that live in namespace metal and are not words of the compiler: without
# `using namespace metal` there is no `uint`.
LIBRARY_TYPE = re.compile(
    r"(?:u?(?:char|short|int|long)|half|float|bfloat|bool)[234]|u(?:char|short|int|long)"
    r"|(?:u?int(?:8|16|32|64)|size|ptrdiff)_t"
)

# What is allowed although no header of MLX's macOS wheel has it.
ALLOWED = {
    "enum": "C++; also how Apple's samples number buffers in headers shared with the host",
    "uint4": "a vector type like the headers' uint2; MLX's own random.metal has it",
}

# Different names of one type.
SYNONYMS = {
    "bfloat16_t": "bfloat",
    "__bf16": "bfloat",
    "float16_t": "half",
    "int32_t": "int",
    "int64_t": "long",
    "uint16_t": "ushort",
    "unsigned short": "ushort",
    "uint32_t": "uint",
    "unsigned int": "uint",
    "uint64_t": "ulong",
    "unsigned long": "ulong",
}

# Words of Metal that the simulator knows by themselves, so that no vocabulary need have them.
METAL_WORDS = {"device", "constant", "threadgroup", "thread", "kernel", "half", "bfloat", "metal"}

NAME = re.compile(r"[A-Za-z_]\w*")
ADDRESS_SPACES = (
    "__global_device",
    "__global_host",
    "__constant",
    "__local",
    "__private",
)
WIDE = re.compile(r"(?<!\w)(?:u?long[234]?|u?int64_t|unsigned long|long long)(?!\w)")
NARROW = ("half", "bfloat")
# What clang itself refuses, as a rule of ours.
REFUSED = {
    "pointers to functions": "function pointer",
    "virtual functions": "virtual function",
    "on 64-bit types": "64-bit simd operation",
    "variables in the constant address space": "program-scope variable",
}
DIAGNOSTIC = re.compile(r"^(\S+?):(\d+):\d+: (error|note): (.*)$", re.MULTILINE)
FUNCTIONS = {
    "FunctionDecl",
    "CXXMethodDecl",
    "CXXConstructorDecl",
    "CXXDestructorDecl",
    "CXXConversionDecl",
}
EXPLICIT_CASTS = {
    "CStyleCastExpr",
    "CXXStaticCastExpr",
    "CXXReinterpretCastExpr",
    "CXXConstCastExpr",
    "CXXAddrspaceCastExpr",
    "CXXFunctionalCastExpr",
}


@dataclass(frozen=True, order=True)
class Violation:
    """A rule that the source breaks, and where: "source:12: recursion: 'f' calls itself"."""

    file: str
    line: int
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.detail}"


def without_comments(text: str) -> str:
    """C++ text with comments blanked and line breaks kept."""
    pattern = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return pattern.sub(
        lambda m: m[0] if m[0][0] == '"' else " " + "\n" * m[0].count("\n"),
        text,
    )


def type_name(written: str) -> str:
    """One name for a type, without qualifiers: "unsigned short" and "uint16_t" are "ushort"."""
    bare = re.sub(r"\b(?:const|volatile|__\w+(?<!__bf16))\b ?", "", written).strip()
    return SYNONYMS.get(bare, bare)


@dataclass(frozen=True)
class Vocabulary:
    """What occurs in a set of Metal sources, comments aside."""

    words: frozenset[str]
    attributes: frozenset[str]
    bit_casts: frozenset[str]  # types T of as_type<T>
    macros: frozenset[str]

    @staticmethod
    def of_text(text: str) -> Vocabulary:
        clean = without_comments(text)
        tokens = [Token(m.group(), m.start()) for m in TOKEN.finditer(clean)]
        tokens = [t for t in tokens if not t.text.isspace()]
        code = [t for t in tokens if not t.text.lstrip().startswith("#")]
        # What macros are defined to be counts, too.
        defined = re.findall(r"^[ \t]*#[ \t]*define\s+((?:.*\\\n)*.*)$", clean, re.MULTILINE)
        words = {t.text for t in code if NAME.fullmatch(t.text)}
        for body in defined:
            words |= set(NAME.findall(body))
        return Vocabulary(
            frozenset(words),
            frozenset(name for name, _ in attributes(code)),
            frozenset(type_name(name) for name in re.findall(r"\bas_type<([^<>]*)>", clean)),
            frozenset(m[0] for body in defined if (m := NAME.match(body))),
        )

    @staticmethod
    def of_headers(directory: Path) -> Vocabulary:
        """Of all headers under `directory`; ValueError if there are none."""
        files = sorted(directory.rglob("*.h"))
        if not files:
            raise ValueError(f"{directory} holds no headers")
        return Vocabulary.of_text("\n".join(file.read_text(encoding="utf-8") for file in files))


def _pruned(node: Node) -> Any:
    """Of a location or a range only the offset where it begins; other nodes unchanged."""
    if "tokLen" in node:
        return node.get("offset")
    if "expansionLoc" in node:
        return node["expansionLoc"]
    if "begin" in node and "end" in node and len(node) == 2:
        return node["begin"]
    return node


class Lines:
    """Offsets in a preprocessed text to files and lines as its markers number them."""

    def __init__(self, text: str) -> None:
        self._starts: list[int] = []
        self._places: list[tuple[str, int]] = []
        file, line, offset = "", 1, 0
        for content in text.splitlines(keepends=True):
            self._starts.append(offset)
            self._places.append((file, line))
            offset += len(content)
            line += 1
            if marker := re.match(r'#\s+(\d+)\s+"([^"]*)"', content):
                file, line = marker[2], int(marker[1])

    def place(self, offset: int) -> tuple[str, int]:
        return self._places[bisect.bisect_right(self._starts, offset) - 1]


def is_function_constant(declaration: Node) -> bool:
    """Whether it has a label for the assembler, as only these do (simulator/source.py)."""
    return any(child.get("kind") == "AsmLabelAttr" for child in declaration.get("inner", ()))


@dataclass
class Checker:
    """Collects the violations of one source."""

    vocabulary: Vocabulary | None = None
    found: set[Violation] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)  # names that the source declares
    # Functions by id: their names and places, and the ids of the functions they call.
    functions: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    calls: dict[str, set[str]] = field(default_factory=dict)

    def report(self, place: tuple[str, int], rule: str, detail: str) -> None:
        self.found.add(Violation(*place, rule, detail))

    # ---- Tokens ----------------------------------------------------------------------------------

    def check_text(self, source: str) -> None:
        for number, line in enumerate(source.splitlines(), 1):
            for character in line:
                if not character.isascii():
                    self.report(("source", number), "non-ASCII source", repr(character))
                    break

    def check_tokens(self, text: str, lines: Lines) -> None:
        """Rules on preprocessed text, in which metal_stdlib comes before the source."""
        tokens = [t for t in tokenise(text) if lines.place(t.start)[0] in CHECKED]
        in_scope = False  # of namespace metal
        for i, token in enumerate(tokens):
            place = lines.place(token.start)
            word = token.text
            after = [t.text for t in tokens[i + 1 : i + 3]]
            if word == "using" and after == ["namespace", "metal"]:
                in_scope = True
            if word in BANNED_WORDS:
                self.report(place, BANNED_WORDS[word], f"the word '{word}'")
            elif word == "std" and after[:1] == ["::"]:
                self.report(place, "std::", "there is no standard library of C++")
            elif re.fullmatch(r"atomic_u?long", word):
                self.report(place, "64-bit atomic", word)
            elif not in_scope and self.is_of_metal(tokens, i):
                self.report(place, "name not in scope", f"'{word}' before `using namespace metal`")
        self.check_vocabulary(tokens, lines)
        if in_scope:
            for name, file, line in self.functions.values():
                if name in LIBRARY_FUNCTIONS:
                    self.report((file, line), "name clash", f"metal::{name} exists")

    def is_of_metal(self, tokens: Sequence[Token], i: int) -> bool:
        """Whether a token is a type of namespace metal or calls a function of it, unqualified."""
        word = tokens[i].text
        before, after = (tokens[k].text if 0 <= k < len(tokens) else "" for k in (i - 1, i + 1))
        if before in ("::", "."):
            return False
        if LIBRARY_TYPE.fullmatch(word):
            return True
        return word in LIBRARY_FUNCTIONS and word not in self.declared and after == "("

    def check_vocabulary(self, tokens: list[Token], lines: Lines) -> None:
        if self.vocabulary is None:
            return
        known = self.vocabulary.words | self.declared | ALLOWED.keys() | METAL_WORDS
        for token in tokens:
            word = token.text
            if not NAME.fullmatch(word):
                continue
            place = lines.place(token.start)
            if word in self.vocabulary.macros and word in self.declared:
                self.report(place, "name clash", f"MLX's headers define a macro '{word}'")
            if word not in known:
                self.report(place, "not in MLX's kernels", f"the word '{word}'")
        for i, token in enumerate(tokens[:-1]):
            if token.text == tokens[i + 1].text == "[":
                for name, _ in attributes(tokens[i : closing_index(tokens, i) + 1]):
                    if name not in self.vocabulary.attributes:
                        place = lines.place(token.start)
                        self.report(place, "not in MLX's kernels", f"the attribute [[{name}]]")

    # ---- The syntax tree -------------------------------------------------------------------------

    def check_tree(self, tree: Node, lines: Lines) -> None:
        for declaration in tree["inner"]:
            place = self.place_of(declaration, lines)
            if place is not None:
                self.visit(declaration, place, lines, None, program_scope=True)
        self.check_recursion()

    def place_of(self, node: Node, lines: Lines) -> tuple[str, int] | None:
        """Where a node of the source is; None outside it."""
        for key in ("loc", "range"):
            offset = node.get(key)
            if isinstance(offset, int):
                place = lines.place(offset)
                return place if place[0] in CHECKED else None
        return None

    def visit(
        self,
        node: Node,
        place: tuple[str, int],
        lines: Lines,
        function: str | None,
        *,
        program_scope: bool,
    ) -> None:
        """Checks a node at `place` and all below it, which belong to the `function` of that id."""
        if not node:  # an absent part of a statement
            return
        kind = node.get("kind", "")
        place = self.place_of(node, lines) or place
        if node.get("isImplicit") and not kind.endswith("Expr"):
            return  # what the compiler declares by itself
        if "name" in node and kind.endswith("Decl"):
            self.declared.add(node["name"])
        if kind.endswith("Decl"):
            self.check_declaration(node, place, program_scope=program_scope)
        else:
            self.check_expression(node, place)
        if kind in FUNCTIONS:
            function = node["id"]
            self.functions[function] = (node.get("name", ""), *place)
            self.calls.setdefault(function, set())
        if function is not None:
            self.calls[function] |= set(self.references(node))
        inside = program_scope and kind in ("NamespaceDecl", "LinkageSpecDecl")
        for child in node.get("inner", ()):
            self.visit(child, place, lines, function, program_scope=inside)

    def references(self, node: Node) -> Iterator[str]:
        """The ids of the functions that an expression names."""
        if "referencedDecl" in node:
            yield node["referencedDecl"]["id"]
        if "referencedMemberDecl" in node:
            yield node["referencedMemberDecl"]

    def check_declaration(self, node: Node, place: tuple[str, int], *, program_scope: bool) -> None:
        kind, name = node["kind"], node.get("name", "")
        written = node.get("type", {}).get("qualType", "")
        if name in TAKEN:
            self.report(place, "name clash", f"'{name}' is {TAKEN[name]}")
        if kind in ("VarDecl", "ParmVarDecl", "FieldDecl", "TypedefDecl", "TypeAliasDecl"):
            # A threadgroup variable is by now a reference to "name_type" (simulator/source.py).
            if not written.startswith(f"{name}_type &"):
                self.check_type(written, place, f"'{name}'")
        elif kind in FUNCTIONS:
            self.check_type(written.split("(", 1)[0], place, f"the result of '{name}'")
        if kind == "VarDecl" and node.get("storageClass") == "static" and not program_scope:
            if "__constant" not in written:
                self.report(place, "static local", f"'{name}'")
        elif (
            kind == "VarDecl"
            and program_scope
            and not ("__constant" in written or is_function_constant(node))
        ):
            self.report(place, "program-scope variable", f"'{name}' is not constant")
        member = kind in FUNCTIONS - {"FunctionDecl"} and not node.get("explicitlyDefaulted")
        if member and node.get("storageClass") != "static":
            qualifiers = written.rsplit(")", 1)[-1]
            if not any(space in qualifiers for space in ADDRESS_SPACES):
                self.report(place, "member function without thread", f"'{name}'")
        if kind == "CXXRecordDecl" and any(b.get("isVirtual") for b in node.get("bases", ())):
            self.report(place, "virtual function", f"a virtual base of '{name}'")

    def check_type(self, written: str, place: tuple[str, int], what: str) -> None:
        """Every pointer and reference must say where it points to."""
        if re.search(r"\((?:\w+::)?[*&][^()]*\)\s*\(", written):
            self.report(place, "function pointer", f"{what} is {written}")
            return
        for level in re.split(r"[*&]+", written)[:-1]:
            if not any(space in level for space in ADDRESS_SPACES):
                self.report(place, "no address space", f"{what} is {written}")
                return

    def check_expression(self, node: Node, place: tuple[str, int]) -> None:
        kind = node.get("kind", "")
        written = node.get("type", {}).get("qualType", "")
        if kind == "LambdaExpr":
            self.report(place, "lambda", "old systems have none")
        elif kind in EXPLICIT_CASTS:
            self.check_type(written, place, "a cast")
        elif kind == "ImplicitCastExpr" and node.get("castKind") == "FloatingCast":
            self.check_narrowing(node, written, place)
        elif kind == "CompoundAssignOperator":
            computed = type_name(node.get("computeResultType", {}).get("qualType", ""))
            result = self.result_type(node)
            if result in NARROW and computed not in (result, ""):
                self.report(place, "implicit narrowing", f"from {computed} to {result}")
        elif kind == "FloatingLiteral" and written == "double":
            self.report(place, "unsuffixed floating literal", f"{node['value']} is double")
        elif kind == "UnaryOperator" and node.get("opcode") == "&":
            for operand in node.get("inner", ()):
                if operand.get("referencedDecl", {}).get("kind") in FUNCTIONS:
                    self.report(place, "function pointer", "the address of a function")
        elif kind == "CallExpr":
            self.check_call(node, place)
        if "atomic<" in written and WIDE.search(written.split("atomic<", 1)[1]):
            self.report(place, "64-bit atomic", written)

    def check_narrowing(self, node: Node, written: str, place: tuple[str, int]) -> None:
        if node.get("isPartOfExplicitCast"):
            return
        result = self.result_type(node)
        if result in NARROW:
            sources = [self.result_type(child) for child in node.get("inner", ())]
            self.report(place, "implicit narrowing", f"from {', '.join(sources)} to {result}")

    def result_type(self, node: Node) -> str:
        kind = node.get("type", {})
        return type_name(kind.get("desugaredQualType", kind.get("qualType", "")))

    def check_call(self, node: Node, place: tuple[str, int]) -> None:
        callee, *arguments = node["inner"]
        while "referencedDecl" not in callee and callee.get("inner"):
            callee = callee["inner"][0]
        name = callee.get("referencedDecl", {}).get("name", callee.get("name", ""))
        if re.match(r"(?:simd|quad)_", name):
            for argument in arguments:
                if WIDE.search(self.result_type(argument)):
                    self.report(place, "64-bit simd operation", f"{name} of a 64-bit type")
        if name == "as_type" and self.vocabulary is not None:
            target = self.result_type(node)
            if target not in self.vocabulary.bit_casts and target != "<dependent type>":
                self.report(place, "not in MLX's kernels", f"as_type<{target}>")

    def check_recursion(self) -> None:
        """Reports every function that can reach itself."""
        calls = {f: callees & self.functions.keys() for f, callees in self.calls.items()}
        for start, (name, file, line) in self.functions.items():
            reached: set[str] = set()
            waiting = set(calls[start])
            while waiting:
                callee = waiting.pop()
                reached.add(callee)
                waiting |= calls[callee] - reached
            if start in reached:
                self.report((file, line), "recursion", f"'{name}' can call itself")

    # ---- The compiler's own words ----------------------------------------------------------------

    def check_diagnostics(self, messages: str) -> None:
        """Errors of clang that no rule has explained; those in a library, where it is used."""
        explained = {(v.file, v.line) for v in self.found}
        places = list(DIAGNOSTIC.finditer(messages))
        for i, message in enumerate(places):
            if message[3] != "error":
                continue
            notes = []
            for note in places[i:]:
                if note is not message and note[3] == "error":
                    break
                notes.append((note[1], int(note[2])))
            place = next((p for p in notes if p[0] in CHECKED), (message[1], int(message[2])))
            if place not in explained:
                rules = (rule for text, rule in REFUSED.items() if text in message[4])
                self.report(place, next(rules, "does not compile"), message[4])


def _syntax_tree(translated: str) -> tuple[Node, str]:
    """Clang's tree of C++ for OpenCL, and its messages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cpp"
        path.write_text(translated)
        command = [*loader._zig(), "clang", *loader.LANGUAGE, *loader.KEYWORDS]
        command += ["-ferror-limit=0", "-fsyntax-only", "-Xclang", "-ast-dump=json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        raise loader.CompileError(done.stderr)
    tree: Node = json.loads(done.stdout, object_hook=_pruned)
    return tree, done.stderr


def check(
    source: str, instantiations: Sequence[str] = (), vocabulary: Vocabulary | None = None
) -> list[Violation]:
    """The rules that Metal source breaks, in order of their lines.

    `instantiations` are appended as a host does at run time; a template that nothing instantiates
    is read as far as it can be. Without a `vocabulary` its rules are left out.
    """
    checker = Checker(vocabulary)
    checker.check_text(source)
    text = loader.preprocess(source, instantiations)
    try:
        translated = translate(text, instrumented=False).kernels_source
    except SourceError as error:
        checker.report(("source", 0), "does not compile", str(error))
        return sorted(checker.found)
    tree, messages = _syntax_tree(translated)
    checker.check_tree(tree, Lines(translated))
    checker.check_tokens(text, Lines(text))
    checker.check_diagnostics(messages)
    return sorted(checker.found)
