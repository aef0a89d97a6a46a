"""Whether a distribution is installed, as a reason for leaving a contender out."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def missing_package(name: str) -> str | None:
    """None where the distribution is installed."""
    try:
        version(name)
    except PackageNotFoundError:
        return f"{name} is not installed"
    return None
