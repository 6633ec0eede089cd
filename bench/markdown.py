"""Writing measured tables into the documents under docs/."""

from __future__ import annotations

from pathlib import Path


def write_section(document: Path, heading: str, section: str) -> None:
    """Put ``section``, which begins with ``heading``, in place of what stands from that heading to the end."""
    before = document.read_text(encoding="utf-8").split(heading)[0].rstrip()
    document.write_text(f"{before}\n\n{section}", encoding="utf-8")
