"""Writes the stubs that editors and type checkers read in place of the lazy faces.

python tools/stubs.py [folder of the package]
"""

import ast
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stubs(package: Path) -> dict[Path, str]:
    """Return the stub of each package with a lazy face, by the file that it belongs in."""
    sys.path.insert(0, str(package.parent))
    faces = importlib.import_module("netwright.runtime.faces")
    found = {}
    for path in sorted(package.rglob("__init__.py")):
        source = path.read_text(encoding="utf-8")
        if "\nface(" not in source:
            continue
        name = ".".join(path.parent.relative_to(package.parent).parts)
        module = importlib.import_module(name)
        public = {**module._found()}
        lines = [f"from {public[entry]} import {entry} as {entry}" for entry in sorted(public)]
        for entry, where in sorted(module._rooms.items()):
            lines.append(f"import {where} as {entry}")
        parts = sorted(faces._parts(path.parent) - set(public) - set(module._rooms))
        lines += [f"from {name} import {part} as {part}" for part in parts]
        if name == "netwright":
            lines.append("__version__: str")
        doc = ast.get_docstring(ast.parse(source)) or ""
        everything = ", ".join(f'"{entry}"' for entry in module.__all__)
        found[path.with_suffix(".pyi")] = "\n".join(
            [f'"""{doc}"""', "", *lines, "", f"__all__ = [{everything}]", ""])
    return found


def write(package: Path) -> None:
    """Write the stubs that are not as they should be; remove those of faces that are gone."""
    wanted = stubs(package)
    for path in package.rglob("__init__.pyi"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "netwright")
