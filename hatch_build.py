"""The packaging hook: the module `pachinko.py` is installed as the package `pachinko`.

PEP 561 has no marker for a lone module, so type checkers would take an installed ``pachinko.py``
for untyped code. In a wheel the same bytes therefore are ``pachinko/__init__.py``, with
``pachinko/py.typed`` beside them. An editable install is left alone: it has to import the file
of the checkout, and a file that the hook names would be a copy frozen at the time of installation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TypedPackageHook(BuildHookInterface[BuilderConfig]):
    """Adds the two paths to a wheel, whose own selection hatchling then leaves out."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files before the build; *version* is ``standard`` or ``editable``."""
        if version != "standard":
            return
        # An empty file: PEP 561 asks for its presence only.
        self._scratch = tempfile.TemporaryDirectory()
        marker = Path(self._scratch.name, "py.typed")
        marker.touch()
        build_data["force_include"] |= {
            str(Path(self.root, "pachinko.py")): "pachinko/__init__.py",
            str(marker): "pachinko/py.typed",
        }

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the marker, which is in the wheel now."""
        if version == "standard":
            self._scratch.cleanup()
