"""Errors that several packages raise."""

from __future__ import annotations


class LoaderError(RuntimeError):
    """The data pipeline failed."""
