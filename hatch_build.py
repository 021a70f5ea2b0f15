"""The packaging hook: it installs each module of the project as a typed package.

PEP 561 has no marker for a lone module, so type checkers would take an installed ``pachinko.py``
for untyped code. In a wheel the same bytes therefore are ``pachinko/__init__.py``, with
``pachinko/py.typed`` beside them, and likewise for ``pachinko_cluster``. The folder ``client`` goes
into the first package, beside the module as in the checkout. The hook leaves an editable install
alone: that one has to import the files of the checkout, and a file that the hook names would be a
copy frozen at the time of installation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGES = ("pachinko", "pachinko_cluster")


class TypedPackageHook(BuildHookInterface[BuilderConfig]):
    """Adds two paths a module, and a folder. hatchling then leaves out the modules' own files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files before the build; *version* is ``standard`` or ``editable``."""
        if version != "standard":
            return
        self._scratch = tempfile.TemporaryDirectory()
        for package in PACKAGES:
            # PEP 561 asks for the presence of the marker only, so it is empty.
            marker = Path(self._scratch.name, package)
            marker.touch()
            build_data["force_include"] |= {
                str(Path(self.root, f"{package}.py")): f"{package}/__init__.py",
                str(marker): f"{package}/py.typed",
            }
        build_data["force_include"][str(Path(self.root, "client"))] = "pachinko/client"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the markers, which are in the wheel now."""
        if version == "standard":
            self._scratch.cleanup()
