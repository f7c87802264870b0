"""Writes the shaders as one C++ string: embed_shaders.py DIRECTORY OUTPUT.

Metal compiles source text at run time and knows no include paths, so the headers of this project go
in where they are included first. The hash is part of the names under which MLX keeps libraries.
"""

import hashlib
import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


def flatten(directory: Path, name: str, seen: set[str]) -> str:
    """The text of a file with everything that it includes from its own directory."""
    if name in seen:
        return ""
    seen.add(name)
    text = (directory / name).read_text(encoding="ascii").replace("#pragma once\n", "")
    return INCLUDE.sub(lambda match: flatten(directory, match[1], seen), text)


def main(directory: Path, output: Path) -> None:
    source = flatten(directory, "kernels.metal", set())
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    output.write_text(
        "// Made of metal/ by cmake/embed_shaders.py.\n"
        "#pragma once\n\n"
        "namespace mlx_welford::gpu {\n\n"
        f'inline constexpr char kShaderHash[] = "{digest}";\n\n'
        f'inline constexpr char kShaderSource[] = R"metal({source})metal";\n\n'
        "}  // namespace mlx_welford::gpu\n",
        encoding="ascii",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
