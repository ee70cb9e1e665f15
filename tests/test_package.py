import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import netwright as nw

ROOT = Path(__file__).parent.parent
SLOW = ("optuna", "plotly", "rich", "sklearn", "tensorboard", "torch_geometric", "transformers",
        "typer", "pandas", "matplotlib", "torch._dynamo")


def test_import_stays_light():
    code = ("import sys, json, netwright; "
            f"print(json.dumps([m for m in {SLOW} if m in sys.modules]))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    already = subprocess.run([sys.executable, "-c", code.replace("netwright", "torch")],
                             capture_output=True, text=True, check=True)
    assert set(json.loads(out.stdout)) <= set(json.loads(already.stdout))


def test_every_public_name_is_there():
    for package in (nw, nw.blocks, nw.flows, nw.rules, nw.reshape, nw.measure, nw.papers,
                    nw.evidence, nw.data, nw.learners, nw.circuits, nw.boosting, nw.optim):
        assert len(package.__all__) == len(set(package.__all__))
        assert all(hasattr(package, name) for name in package.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir",
                    str(folder)], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.check
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"netwright/py.typed", "netwright/catalogue/catalogue.jsonl",
            "netwright/catalogue/evidence.json"} <= set(names)
    assert not any("/results/" in name for name in names)  # the experiments stay in the checkout
    assert not any(name.endswith(".md") for name in names)  # and so do the site's texts
    assert {name.split("/")[0] for name in names} <= {
        "netwright", f"netwright-{nw.__version__}.dist-info"}


@pytest.mark.check
def test_the_wheel_installs_into_an_empty_environment_and_runs(wheel, tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel],
                   check=True, capture_output=True)
    (site,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    # PyTorch and the rest are lent by this environment: installing them again takes minutes.
    (site / "zz_lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    out = subprocess.run([tmp_path / "empty" / "bin" / "netwright", "papers", "finercut"],
                         cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "FinerCut" in out.stdout
    where = subprocess.run([python, "-I", "-c", "import netwright; print(netwright.__file__)"],
                           cwd=tmp_path, check=True, capture_output=True, text=True)
    assert where.stdout.startswith(str(tmp_path))
