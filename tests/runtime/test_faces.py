import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import netwright as nw
from netwright.runtime import faces

ROOT = Path(nw.__file__).parent.parent


def packages():
    found = [nw, *(importlib.import_module(module.name) for module in pkgutil.walk_packages(
        nw.__path__, "netwright.") if module.ispkg)]
    return [package for package in found if isinstance(package, faces.Face)]


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.__name__)
def test_every_name_resolves_and_is_what_its_file_defines(package):
    assert package.__all__
    for name, module in package._found().items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert {*package.__all__} <= {*dir(package)}
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        package.nothing_of_the_kind  # noqa: B018


def test_a_public_name_wins_over_the_file_of_the_same_name():
    for order in ("import netwright.measure.cost", "import netwright.measure"):
        code = (f"{order}\nimport netwright as nw, netwright.measure.cost, types\n"
                "assert isinstance(nw.measure.cost, types.FunctionType)\n"
                "from netwright.measure.cost import cost\nassert cost is nw.measure.cost\n")
        subprocess.run([sys.executable, "-c", code], check=True)


def test_two_files_with_one_public_name_are_refused(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text('__all__ = ["same"]\nsame = 1\n')
    monkeypatch.setattr(faces, "files", lambda package: [
        (f"{package}.{path.stem}", path) for path in sorted(tmp_path.glob("*.py"))])
    with pytest.raises(ImportError, match=r"same is in the __all__ of .*one and of .*two"):
        faces.where("a package that is nowhere")


def test_private_files_show_nothing():
    assert all(not part.startswith("_") for package in packages()
               for module in package._found().values() for part in module.split("."))


def test_each_name_is_declared_on_lines_that_can_be_read_without_importing():
    for module, path in faces.files("netwright"):
        text = path.read_text(encoding="utf-8")
        assert "\n__all__ = " not in text or faces.declared(path), f"{module}'s cannot be read"


def test_the_stubs_say_what_the_faces_show():
    spec = importlib.util.spec_from_file_location("stubs", ROOT / "tools" / "stubs.py")
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    written = stubs.stubs(ROOT / "netwright")
    assert {path.parent.name for path in written} >= {"netwright", "rules", "blocks", "reshape"}
    for path, text in written.items():
        package = importlib.import_module(
            ".".join(path.parent.relative_to(ROOT).parts))
        for name in package.__all__:
            assert f" as {name}\n" in text, f"the stub of {package.__name__} lacks {name}"


def test_importing_the_package_imports_no_torch():
    code = ("import json, sys, netwright; dir(netwright); netwright.__all__\n"
            "print(json.dumps([name for name in ('torch', 'numpy', 'netwright.rules')"
            " if name in sys.modules]))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_a_room_is_the_module_that_its_name_stands_for():
    assert nw.flows is importlib.import_module("netwright.generative.flows")
    assert inspect.ismodule(nw.papers)
