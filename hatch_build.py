"""Writes the stubs of the lazy faces before the package is built or installed."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stubs(BuildHookInterface):
    """Runs `tools/stubs.py`; a face needs no PyTorch, so that an isolated build will do."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the stubs, and have them packed although they are no part of the checkout."""
        root = Path(self.root)
        sys.path.insert(0, str(root / "tools"))
        from stubs import write
        write(root / "netwright")
        build_data["artifacts"].append("netwright/**/*.pyi")
