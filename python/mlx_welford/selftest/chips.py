"""The memory bandwidth of Apple's chips as Apple states it."""

__all__ = ["nominal_bandwidth"]

# GB/s. Where one name stands for chips of several bandwidths, the largest.
_NOMINAL = {
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
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
}


def nominal_bandwidth(device: str) -> float | None:
    """GB/s of a chip named as the system and MLX name it, ``Apple M2 Pro``; None if unknown."""
    return _NOMINAL.get(device.removeprefix("Apple "))
