"""What is measured: each module here does the same work in the way its framework's docs show.

A module has `LABEL`, the `PACKAGES` whose versions matter, its `WIRE`, and either ``create_app()``,
which returns an ASGI application, or ``serve(sock)``, which serves that socket until cancelled.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

NAMES: tuple[str, ...] = (
    "bare",
    "falcon_usual",
    "falcon_expert",
    "pachinko",
    "starlette",
    "fastapi",
    "litestar",
    "channels",
    "socketio",
    "websockets_library",
    "chanx",
)

# Called like a package that they import; an underscore ends the name of the module.
_PACKAGES = {"pachinko", "starlette", "fastapi", "litestar", "channels", "socketio", "chanx"}


def load(name: str) -> ModuleType:
    """Import one peer, and so what it is made of."""
    if name not in NAMES:
        raise ValueError(f"there is no peer {name!r}, only {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}{'_' if name in _PACKAGES else ''}")
