"""A trained network behind HTTP: one page to try it, JSON and PNG for programs. Needs the extra `serve`."""

from __future__ import annotations

from importlib.util import find_spec

from bcmfnet.errors import MissingPackageError

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def require_packages() -> None:
    """Raise MissingPackageError where a package of the extra is not installed."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingPackageError(f"{', '.join(missing)}: needed to serve; pip install 'bcmfnet[serve]'")
