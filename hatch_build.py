"""Writes what a built or installed package has beyond the checkout's own files."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Generated(BuildHookInterface):
    """Writes the stubs of the lazy faces and what was measured, in short; PyTorch is not needed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files, and have them packed although they are no part of the checkout."""
        root = Path(self.root)
        sys.path[:0] = [str(root), str(root / "tools")]
        from stubs import write

        from netwright.catalogue.measurements import ship
        write(root / "netwright")
        ship(root)
        build_data["artifacts"] += ["netwright/**/*.pyi", "netwright/catalogue/evidence.json"]
