"""Compiles a text that it has compiled before, with the same options, by copying the result.

    python compiler_cache.py FOLDER c++ -O3 -c source.cpp -o source.o

As CMAKE_CXX_COMPILER_LAUNCHER for wheels that differ in the CPython that they are for: most sources
know nothing of it. What counts is the preprocessed text, so that folders in the options do not, and
whatever is in the text through them does. A compilation that fails or warns is not kept.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Options that are followed by a value which is a place, or is in the preprocessed text.
PLACES = {"-o", "-I", "-isystem", "-MF", "-MT", "-MQ", "-D", "-U", "-include"}
JOINED = ("-I", "-D", "-U")


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def meaning(command: list[str]) -> list[str]:
    """The compiler and those of its options that the preprocessed text does not tell."""
    kept: list[str] = []
    skip = False
    source = value_of(command, "-c")
    kept.append(Path(source).name)  # which is in the object
    for word in command:
        if skip or word == source:
            skip = False
        elif word in PLACES:
            skip = True
        elif not word.startswith(JOINED):
            kept.append(word)
    return kept


def preprocessed(command: list[str]) -> bytes:
    """The text without line markers; the list of headers is written as the command says."""
    position = command.index("-o")
    others = command[:position] + command[position + 2 :]
    others[others.index("-c")] = "-E"
    return subprocess.run([*others, "-P"], stdout=subprocess.PIPE, check=True).stdout


def compile_once(folder: Path, command: list[str]) -> int:
    if "-c" not in command or "-o" not in command:
        return subprocess.run(command, check=False).returncode
    try:
        text = preprocessed(command)
    except subprocess.CalledProcessError as error:
        return error.returncode
    result = Path(value_of(command, "-o"))
    key = hashlib.sha256("\0".join([result.suffix, *meaning(command), ""]).encode() + text)
    kept = folder / key.hexdigest()[:40]
    if kept.exists():
        shutil.copyfile(kept, result)
        return 0
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    sys.stderr.buffer.write(done.stderr)
    if done.returncode == 0 and not done.stderr:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:  # nobody sees half a file
            shutil.copyfile(result, Path(name) / kept.name).rename(kept)
    return done.returncode


if __name__ == "__main__":
    sys.exit(compile_once(Path(sys.argv[1]), sys.argv[2:]))
