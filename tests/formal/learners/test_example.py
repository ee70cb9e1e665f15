"""The example of the docs runs and learns."""

import importlib.util
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "own_learner.py"


def test_a_table_and_a_network_learn_together(capsys):
    spec = importlib.util.spec_from_file_location("own_learner", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main() == 1
    assert "100 %" in capsys.readouterr().out
    # a row moves by the rate each time that it is asked to
    table = example.table(6, 4, 0.05, torch.Generator().manual_seed(0))
    words = torch.tensor([[0, 1], [2, 2]])
    moved = table.step(words, table(words) + 1).params - table.params
    assert torch.allclose(moved.mean(1), torch.tensor([0.05, 0.05, 0.1, 0, 0, 0]))
