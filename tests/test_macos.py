"""The sources, Metal included, compile and link for macOS, and all symbols they need are there.

What this does not show: that the result runs. No Mac has loaded it.
"""

import re
from pathlib import Path

import pytest
from macos import (
    ANNOTATED,
    NEWER_PLATFORMS,
    OLDEST,
    OWN,
    ROOT,
    RPATH,
    BuildError,
    compile_source,
    extension,
    headers,
    libmlx,
    link,
    mlx_core,
    read,
    shaders,
    unaccounted,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> Path:
    return extension()


def linked(folder: Path, text: str, options: tuple[str, ...] = ANNOTATED) -> Path:
    source = folder / "planted.cpp"
    source.write_text(text)
    return link([compile_source(source, (*options, *OWN))], folder / "planted.so")


def test_is_a_library_for_arm64_and_the_oldest_macos(built: Path) -> None:
    image = read(built)
    assert (image.architecture, image.platform, image.minimum) == ("ARM64", "MACOS", OLDEST)
    assert image.kind == "DYLIB"  # dlopen takes it as it takes a bundle
    assert image.signed  # arm64 runs nothing unsigned; no identity is needed


def test_finds_mlx_beside_itself(built: Path) -> None:
    image = read(built)
    assert image.rpaths == [RPATH]
    assert image.libraries == {
        "@rpath/libmlx.dylib",
        "/usr/lib/libSystem.B.dylib",
        "/usr/lib/libobjc.A.dylib",
    }
    assert read(libmlx()).name == "@rpath/libmlx.dylib"


def test_exports_only_its_entry(built: Path) -> None:
    of_the_linker = {"__mh_dylib_header", "___dso_handle"}
    assert read(built).exports - of_the_linker == {"_PyInit__ext"}


def test_every_undefined_symbol_is_accounted_for(built: Path) -> None:
    assert unaccounted(built) == set()


def test_mlx_itself_is_read_rightly() -> None:
    """What Apple's linker joined fits together: MLX's bindings find all of MLX in libmlx."""
    from_mlx = {symbol for symbol in read(mlx_core()).imports if "N3mlx4core" in symbol}
    assert len(from_mlx) > 100
    assert from_mlx <= read(libmlx()).exports


@pytest.mark.parametrize("platform", NEWER_PLATFORMS)
def test_fits_the_mlx_of_newer_systems(built: Path, platform: str) -> None:
    """There the extension meets another build of libmlx: its classes and symbols must agree."""
    others = headers(platform)
    for path in headers().rglob("*.h*"):
        assert path.read_bytes() == (others / path.relative_to(headers())).read_bytes(), path
    of_mlx = set(read(built).imports) & read(libmlx()).exports
    assert len(of_mlx) > 30
    assert of_mlx <= read(libmlx(platform)).exports


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


@pytest.mark.parametrize(
    "function",
    [
        "mlx4core5metal6deviceE",
        "mlx4core5metal19get_command_encoderE",
        "mlx4core5metal6Device11get_libraryE",
        "mlx4core5metal6Device10get_kernelE",
        "mlx4core5metal14CommandEncoder15set_input_arrayE",
        "mlx4core5metal14CommandEncoder16set_output_arrayE",
        "mlx4core5metal14CommandEncoder13add_temporaryE",
        "mlx4core5metal14CommandEncoder21dispatch_threadgroupsE",
        "s_ksetBytes_length_atIndex_E",
        "s_ksetComputePipelineState_E",
        "s_kmaxTotalThreadsPerThreadgroupE",
    ],
)
def test_the_metal_encoder_is_in_it(built: Path, function: str) -> None:
    (symbol,) = (symbol for symbol in read(built).imports if function in symbol)
    assert symbol in read(libmlx()).exports


def test_the_shaders_are_in_it_and_the_simulator_is_not(built: Path) -> None:
    data = built.read_bytes()
    generated = shaders().read_text()
    digest = re.search(r'kShaderHash\[\] = "(\w+)"', generated)
    source = re.search(r'R"metal\((.*)\)metal"', generated, re.DOTALL)
    assert digest is not None
    assert source is not None
    assert digest[1].encode() in data
    assert source[1].encode() in data
    assert b"simulator_dispatch" not in data
    assert not {"_dlopen", "_dlsym"} & set(read(built).imports)


def test_is_small_and_names_no_path_of_this_machine(built: Path) -> None:
    data = built.read_bytes()
    assert len(data) < 2_000_000
    assert str(ROOT).encode() not in data
