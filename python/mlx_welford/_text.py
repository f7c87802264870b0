"""Tables in plain text, without a library: at run time the package depends on MLX alone."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), indent: int = 0) -> str:
    """Rows with aligned columns, two spaces apart; columns in `numbers` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
