"""Numbers as people read them."""

from __future__ import annotations


def size_text(n_bytes: float) -> str:
    """Bytes with a decimal unit: 812 B, 1.5 kB, 4.92 GB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"
