"""Apple's chips, and the memory bandwidth that Apple states for each."""

__all__ = ["CHIPS", "nominal_bandwidth"]

# GB/s from Apple's technical specifications and announcements, as of November 2026; those of the M5
# family and of the M6 as others quote them. By GPU cores where a name has several. The M6 has 153
# with some sizes of memory.
_NOMINAL: dict[str, float | dict[int, float]] = {
    "M1": 68.25,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": {30: 300, 40: 400},
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": {32: 410, 40: 546},
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": {32: 460, 40: 614},
    "M5 Ultra": 1200,
    "M6": 170,
}

CHIPS = tuple(_NOMINAL)
"""Names as the system and MLX give them, without "Apple"."""


def nominal_bandwidth(device: str, gpu_cores: int | None = None) -> float | None:
    """GB/s of a chip named as the system and MLX name it, ``Apple M2 Pro``; None if unknown.

    Where one name stands for several bandwidths, the number of GPU cores decides; without it, or
    with one that is not listed, it is the largest.
    """
    nominal = _NOMINAL.get(device.removeprefix("Apple "))
    if isinstance(nominal, dict):
        return nominal.get(gpu_cores or 0, max(nominal.values()))
    return nominal
