"""Packages that only some formats need."""

from __future__ import annotations

import importlib.util

from rsengine.errors import SettingsError


def require(what: str, *packages: str) -> None:
    """Raise :class:`SettingsError` unless all ``packages`` are installed; the line names the command that brings them.

    Args:
        what: needs them, for the message.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"{what}: needs {', '.join(missing)}, not installed here; pip install 'rsengine[export]'")
