"""Which code an experiment depends on, read without running it, and a fingerprint of that code."""

import ast
import hashlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from netwright.evidence.folder import folder
from netwright.runtime.faces import Face, files

__all__: list[str] = []

# What says, records and reports has no part in what is measured.
APART = ("netwright.catalogue", "netwright.checks", "netwright.errors", "netwright.evidence",
         "netwright.runtime.faces", "netwright.runtime.progress")
BUT = ("netwright.evidence.train",)
PACKAGES = ("netwright", "evidence")

Place = tuple[str, str | None]  # a module and a name defined in it, None for all of it


def fingerprints(modules: Iterable[str]) -> dict[str, str]:
    """Return for each module 12 hexadecimal digits that change when code changes that it uses.

    They stand for the definitions that the module reaches through imports, in whatever file those
    are. Comments, docstrings, annotations, layout, checks that only raise and what a method says
    of itself do not count.
    """
    _read_anew()
    return {module: _digest(_reached(module)) for module in set(modules)}


def dependencies(module: str) -> set[Place]:
    """Return what is reached from `module`, as pairs of a module and a name defined in it."""
    _read_anew()
    return _reached(module)


def _digest(places: Iterable[Place]) -> str:
    source = sorted({text for place in places for text in _texts(*place)})
    return hashlib.sha256("\0".join(source).encode()).hexdigest()[:12]


def _reached(module: str) -> set[Place]:
    found: set[Place] = set()
    open_: list[Place] = list(_all(module))
    while open_:
        place = open_.pop()
        if place not in found:
            found.add(place)
            open_ += _references(*place)
    return found


@dataclass
class _File:
    """A module's top-level statements by the names they define, and where its imports lead."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    always: list[ast.stmt] = field(default_factory=list)  # run at import, and define nothing
    imports: dict[str, tuple[str, ...]] = field(default_factory=dict)  # module, name


def _read_anew() -> None:
    """Forget what was read, because files may have changed since."""
    for function in (_read, _texts, _references):
        function.cache_clear()


@cache
def _texts(module: str, name: str | None) -> tuple[str, ...]:
    return tuple(ast.unparse(statement) for statement in _statements(module, name))


@cache
def _references(module: str, name: str | None) -> tuple[Place, ...]:
    """Return the places that the definition of `name` in `module` refers to."""
    file = _read(module)
    found: list[Place] = []
    for statement in _statements(module, name):
        for root, *rest in _chains(statement):
            if root in file.definitions:
                found.append((module, root))
            elif root in file.imports:
                found += _resolved(file.imports[root][0], [*file.imports[root][1:], *rest])
    return tuple(dict.fromkeys(found))


def _statements(module: str, name: str | None) -> list[ast.stmt]:
    file = _read(module)
    return file.always if name is None else [*file.definitions[name], *file.always]


def _all(module: str) -> list[Place]:
    return [(module, None), *((module, name) for name in _read(module).definitions)]


def _resolved(module: str, names: list[str]) -> list[Place]:
    """Return the places that `module.name.name…` stands for, none outside of this project."""
    if module.split(".")[0] not in PACKAGES:
        return []
    if _path(module).name != "__init__.py":
        if module.startswith(APART) and module not in BUT:
            return []
        if not names:
            return _all(module)
        file, name = _read(module), names[0]
        if name in file.imports:
            return _resolved(file.imports[name][0], [*file.imports[name][1:], *names[1:]])
        return [(module, name)] if name in file.definitions else []
    return _in_package(module, names)


def _in_package(package: str, names: list[str]) -> list[Place]:
    face = importlib.import_module(package) if package.startswith("netwright") else None
    if not names or names[0].startswith("__"):  # such as __all__: any of it may be used
        return [place for module, _ in files(package) if module != package
                for place in _resolved(module, [])]
    name, *rest = names
    if isinstance(face, Face):
        if name in face._rooms:
            return _resolved(face._rooms[name], rest)
        if name in face._found():
            return _resolved(face._found()[name], names)
    if _exists(f"{package}.{name}"):
        return _resolved(f"{package}.{name}", rest)
    imported = _read(package).imports.get(name)
    return _resolved(imported[0], [*imported[1:], *rest]) if imported else []


def _chains(statement: ast.stmt) -> Iterator[list[str]]:
    """Yield each name that is read, with the attributes that are taken of it."""
    inner = set()
    for node in ast.walk(statement):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            inner.add(id(node.value))
            node = node.value
        if isinstance(node, ast.Name) and (names or id(node) not in inner):
            yield [node.id, *names]


@cache
def _read(module: str) -> _File:
    tree = _Bare().visit(ast.parse(_path(module).read_text(encoding="utf-8")))
    file = _File()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                file.imports[alias.asname or alias.name] = node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                file.imports[alias.asname or whole] = (whole,)
    for statement in tree.body:
        names = _defined(statement)
        if "__all__" in names or isinstance(statement, (ast.Import, ast.ImportFrom, ast.Pass)):
            continue
        for name in names:
            file.definitions.setdefault(name, []).append(statement)
        if not names:
            file.always.append(statement)
    return file


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else (
        [statement.target] if isinstance(statement, (ast.AnnAssign, ast.AugAssign)) else [])
    return [node.id for target in targets for node in ast.walk(target)
            if isinstance(node, ast.Name)]


class _Bare(ast.NodeTransformer):
    """Takes away what does not act on a result: docstrings, annotations, facets, checks."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs,
                         node.args.vararg, node.args.kwarg):
            if argument is not None:
                argument.annotation = None
        return self.visit_ClassDef(node)

    def visit_ClassDef(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        node.decorator_list = [made for made in node.decorator_list if not (
            isinstance(made, ast.Call) and ast.unparse(made.func) == "method")]
        for made in node.decorator_list:
            if isinstance(made, ast.Call) and ast.unparse(made.func) == "evidence":
                made.keywords = [given for given in made.keywords if given.arg != "shortfall"]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant):
            return None  # a docstring
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("checks."):
            return None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        # What only refuses has let through whatever gave a result.
        only_checks = all(isinstance(line, (ast.Raise, ast.Pass)) for line in node.body)
        return None if only_checks and not node.orelse else node

    def visit_For(self, node: ast.For) -> ast.AST | None:
        self.generic_visit(node)
        return None if isinstance(node.body[0], ast.Pass) and not node.orelse else node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if not isinstance(node, ast.Module) and getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


def _exists(module: str) -> bool:
    top, *parts = module.split(".")
    path = _home(top).joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _path(module: str) -> Path:
    top, *parts = module.split(".")
    if top not in PACKAGES:  # a file of the user's own, which was imported to find the experiment
        return Path(str(sys.modules[module].__file__))
    path = _home(top).joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _home(package: str) -> Path:
    return folder() if package == "evidence" else Path(__file__).resolve().parents[1]
