"""The CPU kernels are compiled for several instruction sets; MLX_WELFORD_ISA chooses one."""

from pathlib import Path

import pytest
from processes import SMALL, assert_equal_within_rounding, compute, run, skip_unless_present
from reference import Array


@pytest.fixture(scope="module")
def by_default(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    return compute(tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3", "x86_64_v4"])
def test_results_do_not_depend_on_the_instruction_set(
    isa: str, by_default: dict[str, Array], tmp_path: Path
) -> None:
    skip_unless_present(isa)
    assert_equal_within_rounding(compute(tmp_path, isa=isa), by_default)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "selected"),
    [
        # Narrow columns and all the lines, in 16 bits: where instruction sets differ most
        ("cpu/test_past_caches.py", "[1 and float16"),
        ("numerics/test_statistics.py", "moments"),
        # Not all of them have a fused multiply_add, which the exponential is best with
        ("cpu/test_epilogue.py", "accurate or exact"),
        ("numerics/test_epilogue.py", "every_activation"),
    ],
)
@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3"])
def test_each_is_as_exact(isa: str, file: str, selected: str) -> None:
    """Tests that are particular about bits, or about the last digits."""
    skip_unless_present(isa)
    tests = str(Path(__file__).parents[1] / file)
    run(
        f"""
        import sys, pytest
        sys.exit(pytest.main(["-q", "--backend", "cpu", {tests!r}, "-k", {selected!r}]))
        """,
        isa=isa,
    )


def test_an_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(AssertionError, match="RuntimeError: MLX_WELFORD_ISA=z80 is not an instr"):
        run(SMALL, isa="z80")
