import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from netwright.rules import Backprop


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(144, 5))


@pytest.mark.parametrize("loss", [cross_entropy, lambda scores, y: mse_loss(scores[:, 0], y / 5)])
def test_gradients_and_loss_are_those_of_backward_bit_for_bit(loss):
    ours, plain = network(), network()
    x, y = torch.randn(6, 1, 8, 8), torch.randint(5, (6,))
    found = Backprop(ours, loss=loss)(x, y)
    expected = loss(plain(x), y)
    expected.backward()
    assert torch.equal(found, expected.detach())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
