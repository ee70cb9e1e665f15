"""Scripts that run in processes of their own, read as modules too."""

import importlib.util
from pathlib import Path
from types import ModuleType


def worker(test: str, name: str) -> ModuleType:
    """Return the script called `name` that stands beside the file of a test."""
    path = Path(test).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
