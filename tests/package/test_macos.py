"""What macos.py finds out about files for macOS is right, of MLX's own and of planted ones.

Our wheel is looked into by test_wheel.py.
"""

from pathlib import Path

import pytest
from macos import COMPILE, BuildError, libmlx, library, mlx_core, read, unaccounted

pytestmark = pytest.mark.slow


def linked(folder: Path, text: str, options: tuple[str, ...] = COMPILE) -> Path:
    source = folder / "planted.cpp"
    source.write_text(text)
    return library(source, folder / "planted.so", options)


@pytest.mark.quick
def test_mlx_itself_is_read_rightly() -> None:
    """What Apple's linker joined fits together: MLX's bindings find all of MLX in libmlx."""
    assert read(libmlx()).name == "@rpath/libmlx.dylib"
    from_mlx = {symbol for symbol in read(mlx_core()).imports if "N3mlx4core" in symbol}
    assert len(from_mlx) > 100
    assert from_mlx <= read(libmlx()).exports


def test_unknown_symbols_are_reported(tmp_path: Path) -> None:
    planted = linked(
        tmp_path,
        """
        namespace mlx::core { void not_exported(int); }
        extern "C" void no_such_function();
        extern "C" void PyNoSuch_Function();
        extern "C" __attribute__((visibility("default"))) void planted() {
          mlx::core::not_exported(1);
          no_such_function();
          PyNoSuch_Function();
        }
        """,
    )
    assert unaccounted(planted) == {
        "__ZN3mlx4core12not_exportedEi",
        "_no_such_function",
        "_PyNoSuch_Function",
    }


HASHED = """
#include <string>
extern "C" __attribute__((visibility("default"))) unsigned long planted(const std::string& text) {
  return std::hash<std::string>{}(text);
}
"""


def test_what_only_a_newer_libcxx_has_is_reported(tmp_path: Path) -> None:
    """std::hash<std::string> calls a function of LLVM 21's libc++ where there is that library."""
    hash_memory = "__ZNSt3__113__hash_memoryEPKvm"
    assert unaccounted(linked(tmp_path, HASHED, options=())) == {hash_memory}
    assert unaccounted(linked(tmp_path, HASHED)) == set()


def test_what_only_a_newer_system_has_does_not_compile(tmp_path: Path) -> None:
    """strchrnul is in Linux's C library as well, so that its symbol would not be reported."""
    text = """
    #include <string.h>
    extern "C" __attribute__((visibility("default"))) char* planted(const char* text) {
      return strchrnul(text, 'x');
    }
    """
    with pytest.raises(BuildError, match=r"'strchrnul' is only available on macOS 15\.4"):
        linked(tmp_path, text)


def test_strings_have_the_layout_of_apples_libcxx(tmp_path: Path) -> None:
    linked(
        tmp_path,
        """
        #include <string>
        #ifndef _LIBCPP_ABI_ALTERNATE_STRING_LAYOUT
        #error "strings would be laid out differently from libmlx's"
        #endif
        static_assert(_LIBCPP_ABI_VERSION == 1);
        """,
    )
