import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from netwright import cli


def run(*arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["netwright", *arguments])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def netwright(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(*arguments, capsys=capsys, monkeypatch=monkeypatch)


TASK = """
import torch
from torch import nn
import netwright as nw

x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()
task = nw.Task("halves", lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)),
               data=nw.data.Split(x[:90], y[:90], x[90:], y[90:]), epochs=2, batch_size=30)
"""


def test_help_names_every_command(netwright):
    status, out, _ = netwright()
    assert status == 0
    for command in ("compare", "fit", "stages", "papers", "evidence"):
        assert command in out
        assert netwright(command, "--help")[0] == 0


def test_papers(netwright):
    status, out, _ = netwright("papers", "finercut", "--json")
    assert status == 0
    assert [entry["id"] for entry in json.loads(out)] == ["000-012"]
    assert "FinerCut" in netwright("papers", "finercut")[1]
    assert "No paper fits" in netwright("papers", "xyzzy")[1]
    status, out, _ = netwright("papers", "--family", "rule", "--missing", "--json")
    assert status == 0
    assert all(not entry["names"] and entry["family"] == "rule" for entry in json.loads(out))


def test_find(netwright):
    status, out, _ = netwright("find", "--need", "inference time", "--kind", "reshapes", "--json")
    assert status == 0
    rows = json.loads(out)
    assert "reshape.prune_sublayers" in [row["name"] for row in rows]
    assert all("inference time" in row["saves"] for row in rows)
    assert "reshape.prune_sublayers (reshape, residual stream)" in netwright("find", "finercut")[1]
    assert "No method fits" in netwright("find", "xyzzy")[1]
    status, _, err = netwright("find", "--place", "feedforwards")
    assert (status, "did you mean feedforward?" in err) == (2, True)


def test_applicable(netwright):
    status, out, _ = netwright("applicable", "char-gpt", "--kind", "reshape", "--all", "--json")
    assert status == 0
    found = {row["name"]: row for row in json.loads(out)}
    assert found["reshape.prune_sublayers"]["applies"]
    assert found["reshape.prune_experts"]["why"] == "the network has no mixture of experts"
    out = netwright("applicable", "digits-mlp", "--need", "training memory")[1]
    assert "rules.MonoForward" in out
    assert netwright("applicable", "netwright.models:cnn")[0] == 2


def test_list(netwright):
    out = netwright("list")[1]
    for what in ("rules", "reshapes", "blocks", "tasks", "data", "papers"):
        assert what in out
        status, found, _ = netwright("list", what, "--json")
        assert status == 0
        assert json.loads(found)
    assert "rules.MonoForward" in netwright("list", "rules")[1]
    assert "char-gpt" in netwright("list", "tasks")[1]
    assert "mnist1d" in netwright("list", "data")[1]
    status, _, err = netwright("list", "rulez")
    assert (status, "did you mean rules?" in err) == (2, True)


@pytest.mark.check  # it reads what every experiment's code reaches
def test_evidence_list_shows_the_verdicts(netwright):
    status, out, _ = netwright("evidence", "list", "--json")
    assert status == 0
    assert len(json.loads(out)) >= 7
    assert "shown" in netwright("evidence", "list")[1]


EXPERIMENTS = """
from netwright.evidence import Outcome, evidence, figure

@evidence(paper="000-012", claim="one is more", shown=[figure("one") > 0])
def one_is_more(scale):
    return Outcome(setting={"seeds": 1}, figures={"one": [ONE]})

@evidence(paper="000-012", claim="two is more", shown=[figure("two") > 1])
def two_is_more(scale):
    return Outcome(setting={"seeds": 1}, figures={"two": [TWO]})
"""


def test_evidence_that_is_older_than_its_code_is_run_again(netwright, tmp_path, monkeypatch):
    home = tmp_path / "own"
    home.mkdir()
    (home / "own.py").write_text(EXPERIMENTS.replace("ONE", "1.0").replace("TWO", "2.0"))
    monkeypatch.setenv("NETWRIGHT_EVIDENCE", str(home))
    assert netwright("evidence", "run")[0] == 2  # nothing is named
    status, out, err = netwright("evidence", "run", "--stale")  # what was never run is run
    assert (status, out.count("holds: ")) == (0, 2), err
    assert "2 of 2" in err
    assert "No result" in netwright("evidence", "run", "--stale")[1]
    (home / "own.py").write_text(EXPERIMENTS.replace("ONE", "-1.0").replace("TWO", "2.0"))
    listed = json.loads(netwright("evidence", "list", "--json")[1])
    assert {name: row["age"] for name, row in listed.items()} == dict.fromkeys(
        ("one_is_more", "two_is_more"), "older than its code")
    assert "2 results are older" in netwright("evidence", "list")[1]
    assert "does not hold: one > 0" in netwright("evidence", "run", "one_is_more")[1]
    assert json.loads((home / "results" / "one_is_more.json").read_text())["verdict"] == "not shown"


def test_evidence_goes_on_where_an_experiment_fails(netwright, tmp_path, monkeypatch):
    home = tmp_path / "own"
    home.mkdir()
    (home / "own.py").write_text(EXPERIMENTS.replace("ONE", "nothing").replace("TWO", "2.0"))
    monkeypatch.setenv("NETWRIGHT_EVIDENCE", str(home))
    status, out, err = netwright("evidence", "run", "--stale")
    assert status == 2
    assert "one_is_more failed: NameError" in err
    assert "holds: two > 1" in out


def test_evidence_without_a_checkout_lists_what_is_shipped(netwright, monkeypatch):
    monkeypatch.setattr("netwright.evidence.folder.checkout", lambda: None)
    status, out, _ = netwright("evidence", "list", "--json")
    assert status == 0
    assert json.loads(out)["mono_forward"]["verdict"] == "partly shown"
    status, _, err = netwright("evidence", "run", "mono_forward")
    assert status == 2
    assert "NETWRIGHT_EVIDENCE" in err


def test_the_anatomy_of_a_task_and_of_a_module(netwright):
    assert "convolution" in netwright("anatomy", "digits-cnn")[1]
    status, out, _ = netwright("anatomy", "torch.nn:TransformerEncoderLayer", "--shape", "1,4,8")
    assert status == 2  # it is built from sizes
    status, out, _ = netwright("anatomy", "torch.nn:Identity", "--shape", "1,4")
    assert (status, out.split()) == (0, ["part", "name", "sizes"])
    status, _, err = netwright("anatomy", "torch.nn:Identity")
    assert status == 2
    assert "--shape" in err


def test_stages_of_a_task_a_file_and_a_module(netwright, tmp_path):
    assert "conv" in netwright("stages", "digits-cnn")[1].lower()
    (tmp_path / "own.py").write_text(TASK)
    status, out, _ = netwright("stages", "own.py")
    assert status == 0
    assert "Linear" in out
    status, out, _ = netwright("stages", "torch.nn:TransformerEncoderLayer", "--shape", "1,4,8")
    assert status == 2  # it needs arguments, and the line says which


def test_fit_and_resume(netwright, tmp_path):
    (tmp_path / "own.py").write_text(TASK)
    arguments = ("fit", "own.py", "--rule", "MonoForward", "--epochs", "2", "--checkpoint", "kept",
                 "--plot", "curve.html", "--quiet")
    status, _, err = netwright(*arguments)
    assert status == 0, err
    assert (tmp_path / "curve.html").stat().st_size > 1000
    assert any((tmp_path / "kept").iterdir())
    assert netwright(*arguments)[0] == 0


def test_fit_and_compare_take_recipes(netwright, tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "mine.json").write_text(json.dumps({"optimizer": {"name": "torch.optim.SGD"}}))
    recipe = "mlp(hidden=[4]) + MonoForward + SGD(momentum=0.5)"
    status, out, err = netwright("fit", "task.py", "-c", recipe, "--quiet")
    assert (status, err) == (0, "")
    assert "accuracy on the test set" in out
    status, out, _ = netwright("compare", "task.py", "-c", recipe, "-c", "mine.json", "-c", "GLU",
                               "--seeds", "1", "--trials", "1", "--workers", "1", "--quiet")
    assert status == 0
    shown = " ".join(out.split())
    assert "GLU on halves failed: GLU cannot run on task 'halves' because" in shown
    assert {"SGD", "mlp(hidden=[4])"} <= set(shown.split())


def test_compare_on_a_task_of_ones_own(netwright, tmp_path):
    (tmp_path / "own.py").write_text(TASK)
    status, out, err = netwright("compare", "own.py", "-c", "Backprop", "-c", "MonoForward",
                                 "--seeds", "2", "--trials", "1", "--workers", "1", "--quiet")
    assert status == 0, err
    assert "MonoForward" in out
    assert "halves" in (tmp_path / "report.html").read_text()


BAD = {
    "an unknown command": (["compar"], "compar"),
    "an unknown option": (["papers", "--famly", "rule"], "--famly"),
    "a number out of range": (["compare", "--seeds", "0"], "--seeds"),
    "an unknown task": (["compare", "digits-mpl"], "digits-mlp"),
    "an unknown change": (["compare", "digits-mlp", "-c", "MonoForwad"], "MonoForward"),
    "a file that does not exist": (["compare", "nowhere.py"], "nowhere.py"),
    "an unknown family": (["papers", "--family", "rulez"], "rule"),
    "an unknown evidence": (["evidence", "run", "nothing"], "nothing"),
    "an unknown scale": (["evidence", "run", "nothing", "--scale", "huge"], "huge"),
    "an unknown rule": (["fit", "digits-mlp", "--rule", "Backdrop"], "Backprop"),
    "an unreachable storage": (["compare", "digits-mlp", "-c", "Backprop", "--storage",
                                "postgresql://nobody@127.0.0.1:1/none"], "127.0.0.1"),
    "a network that is nowhere": (["stages", "torch.nn:Linaer"], "Linaer"),
    "a shape that is none": (["stages", "torch.nn:Identity", "--shape", "1,x"], "--shape"),
    "an unknown argument": (["fit", "digits-mlp", "-c", "LLS(heat=1)"], "'heat'"),
    "a recipe that is none": (["compare", "digits-mlp", "-c", "LLS +"], "a plus between them"),
    "a recipe's file that is not there": (["fit", "digits-mlp", "-c", "no.json"], "no.json"),
    "a shape of a task": (["stages", "digits-mlp", "--shape", "1,3"], "--shape"),
    "a module that is nowhere": (["stages", "nowhere_at_all:net"], "nowhere_at_all"),
    "a network without a name": (["stages", "torch.nn:"], "package.module:name"),
    "a page in no folder": (["compare", "digits-mlp", "--report", "none/report.html"], "--report"),
    "a page that is a folder": (["compare", "digits-mlp", "--report", "."], "--report"),
    "a plot in no folder": (["fit", "digits-mlp", "--plot", "none/plot.html"], "--plot"),
    "a checkpoint that is a file": (["fit", "digits-mlp", "--checkpoint", __file__],
                                    "--checkpoint"),
    "results that are a file": (["evidence", "run", "forward_forward", "--results", __file__],
                                "--results"),
    "a learning rate below 0": (["fit", "digits-mlp", "--lr", "-1"], "--lr"),
    "a seed below 0": (["fit", "digits-mlp", "--seed", "-1"], "--seed"),
    "a storage in memory": (["compare", "digits-mlp", "--storage", "sqlite://"], "in memory"),
    "a rule after a rule": (["compare", "digits-mlp", "-c", "Backprop+NoProp"], "end with"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=list(BAD))
def test_bad_input_gets_one_line_and_status_2(netwright, arguments, said):
    status, _, err = netwright(*arguments)
    assert status == 2
    assert said in err
    assert err.startswith("netwright: ")
    assert err.count("\n") == 1


def test_a_task_file_that_raises_is_named_with_its_line(netwright, tmp_path):
    (tmp_path / "own.py").write_text("x = 1\nraise RuntimeError('no luck')\n")
    status, _, err = netwright("compare", "own.py")
    assert status == 2
    assert "own.py" in err
    assert "no luck" in err
    assert "line 2" in err


def test_control_c_says_how_to_go_on(netwright, monkeypatch, tmp_path):
    def stop(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr("netwright.compare", stop)
    status, _, err = netwright("compare", "digits-mlp", "--quiet")
    assert status == 130
    assert "run the same command again to go on where it stopped" in err
    assert list(tmp_path.iterdir()) == []


RAISING = """
def network():
    raise KeyError("boom")
task = nw.Task("own", network, data=nw.data.digits)
"""


@pytest.mark.parametrize("command", [("compare", "own.py"), ("fit", "own.py"),
                                     ("stages", "own.py"), ("stages", "own:network")])
def test_what_a_users_code_raises_is_one_line_too(netwright, tmp_path, command):
    (tmp_path / "own.py").write_text("import netwright as nw\n" + RAISING)
    status, _, err = netwright(*command)
    assert status == 2
    assert "KeyError: 'boom'" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".db", ".html")] == []


def test_a_comparison_in_which_nothing_ran_leaves_the_page_alone(netwright, tmp_path):
    (tmp_path / "own.py").write_text(TASK.replace("epochs=2", "learning_rate=1e38, epochs=2"))
    (tmp_path / "report.html").write_text("an earlier page")
    status, out, err = netwright("compare", "own.py", "-c", "Backprop", "--seeds", "1",
                                 "--trials", "1", "--workers", "1", "--quiet")
    assert status == 2
    assert "failed" in out
    assert "no change could be run" in err
    assert err.count("\n") == 1
    assert (tmp_path / "report.html").read_text() == "an earlier page"


def test_missing_data_says_what_was_looked_for(netwright, monkeypatch):
    monkeypatch.delenv("NETWRIGHT_DATA", raising=False)
    status, _, err = netwright("compare", "mnist-mlp", "-c", "Backprop")
    assert status == 2
    assert "NETWRIGHT_DATA" in err


def test_the_module_runs_as_a_program():
    found = subprocess.run([sys.executable, "-m", "netwright", "papers", "finercut"],
                           capture_output=True, text=True)
    assert found.returncode == 0
    assert "FinerCut" in found.stdout


def test_the_version(netwright):
    assert netwright("--version")[:2] == (0, f"netwright {version('netwright')}\n")


def test_being_asked_to_end_is_said(tmp_path):
    (tmp_path / "slow.py").write_text(TASK + "import time\nprint('here', flush=True)\n"
                                      "time.sleep(100)\n")
    process = subprocess.Popen([sys.executable, "-m", "netwright", "fit", "slow.py"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143
    assert err.strip().endswith(cli.STOPPED)


@pytest.mark.check
def test_demo(netwright, tmp_path):
    status, out, err = netwright("demo", "--quiet", "--budget", "30s", "--out", "made")
    assert (status, err) == (0, "")
    assert "of the digits it has not seen" in out
    assert "The changed networks are in made" in out
    assert "What to change in" in (tmp_path / "made" / "index.html").read_text()
