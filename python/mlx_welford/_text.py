"""Tables in plain text, since the package needs nothing but MLX at run time."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), indent: int = 0) -> str:
    """Rows with their columns aligned, two spaces apart: to the right in the columns `numbers`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
