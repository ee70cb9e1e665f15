import math

import torch

from netwright.objectives.metrics import accuracy


def test_accuracy_is_the_share_of_right_classes_among_those_that_count() -> None:
    scores = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]]])
    y = torch.tensor([[0, 1], [1, -100]])
    assert accuracy(scores, y) == 2 / 3
    assert math.isnan(accuracy(scores, torch.full_like(y, -100)))
