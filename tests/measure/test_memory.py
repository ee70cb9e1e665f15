import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.reversible import AdditiveCoupling, ReversibleSequential
from netwright.measure import Memory, cost, memory
from netwright.rules import Backprop, MonoForward, Reversible

BATCH = torch.randn(32, 16), torch.randint(4, (32,))


def deep(depth):
    half = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())  # noqa: E731
    return nn.Sequential(nn.Linear(16, 16),
                         *[AdditiveCoupling(half(), half()) for _ in range(depth)],
                         nn.Linear(16, 4))


@pytest.fixture(scope="module")
def found():
    return memory(deep, [2, 6], BATCH, rules={
        "Backprop": Backprop, "Reversible": Reversible,
        "local": lambda network: MonoForward(network, BATCH[0]), "plain": lambda n: n})


def test_figures_are_those_of_cost(found):
    alone = cost(Reversible(deep(6)), BATCH, repeats=1, warmup=0)
    assert found.saved["Reversible"][1] == alone.saved_bytes
    assert found.working["Reversible"][1] == alone.working_bytes
    assert found.saved["plain"] == found.saved["Backprop"]
    assert list(found.saved) == list(found.working) == ["Backprop", "Reversible", "local", "plain"]


def test_what_grows_with_depth_is_told_from_what_does_not(found):
    growth = found.growth()
    assert growth["Backprop"] > 2
    assert growth["Reversible"] < 1.02
    assert growth["local"] < 1.1
    working = found.growth("working")
    assert working["Backprop"] > 1.5
    assert working["Reversible"] < 1.02


def test_figures_are_the_same_again_and_leave_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = memory(deep, (2, 3), BATCH)
    assert torch.equal(torch.rand(3), expected)
    assert first == memory(deep, (2, 3), BATCH)
    assert list(first.saved) == ["Backprop"]


def test_networks_without_a_rule_use_the_loss_given():
    network = lambda depth: ReversibleSequential(  # noqa: E731
        *[AdditiveCoupling(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(depth)])
    squared = memory(network, (2, 6), (BATCH[0], BATCH[0]), rules={"plain": lambda n: n},
                     loss=nn.functional.mse_loss)
    assert squared.growth()["plain"] == 1.0


def test_the_table_has_every_figure_in_readable_units():
    small = Memory((4, 16), {"a": (512, 2048), "long name": (3 * 2 ** 20, 0)},
                   {"a": (0, 5), "long name": (2 ** 31, 2 ** 31)})
    title, head, first, second = small.table().splitlines()
    assert "saved for backward" in title
    assert "working memory" in title
    assert head.split() == ["depth", "4", "16", "growth", "4", "16", "growth"]
    assert first.split() == ["a", "512", "B", "2.0", "KiB", "4.00", "0", "B", "5", "B", "inf"]
    assert second.split("  ")[0] == "long name"
    assert second.split()[2:] == ["3.0", "MiB", "0", "B", "0.00", "2.0", "GiB", "2.0", "GiB",
                                  "1.00"]
    assert len({len(line) for line in (head, first, second)}) == 1
    assert str(small) == small.table()


def test_the_figure_has_a_line_for_each_rule_and_is_written(found, tmp_path):
    figure = found.plot(tmp_path / "memory.html")
    assert [trace.name for trace in figure.data] == [n for n in found.saved for _ in range(2)]
    assert tuple(figure.data[2].y) == found.saved["Reversible"]
    assert tuple(figure.data[3].y) == found.working["Reversible"]
    assert figure.layout.xaxis.title.text == "depth"
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    assert "Reversible" in page
    assert nw.measure.memory is memory


def test_errors():
    with pytest.raises(ValueError, match=r"depths must hold at least one depth.*got \(\)"):
        memory(deep, [], BATCH)
    with pytest.raises(ValueError, match="each once"):
        memory(deep, [4, 4], BATCH)
    with pytest.raises(ValueError, match="rules must name at least one rule"):
        memory(deep, [4], BATCH, rules={})
    with pytest.raises(ValueError, match=r"batch must be the pair \(x, y\)"):
        memory(deep, [4], BATCH[0])
    with pytest.raises(ValueError, match="no kind of memory is called 'peak'; known are saved, w"):
        memory(deep, [2], BATCH).growth("peak")
