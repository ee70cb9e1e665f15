from collections.abc import Callable, Sequence

from torch import nn

from netwright.catalogue.facets import method

__all__ = ["mlp"]


@method("model", place="whole network", takes=("inputs", "classes"))
def mlp(inputs: int, classes: int, *, hidden: Sequence[int] = (256, 256),
        activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a multi-layer perceptron that flattens what it is given.

    Args:
        inputs: numbers of a sample.
        classes: scores that are returned.
        hidden: the width of each hidden layer.
        activation: makes what follows each of them.

    Shapes: x (batch, *size) with prod(size) = inputs; out (batch, classes).

    >>> import torch
    >>> mlp(64, 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    layers: list[nn.Module] = [nn.Flatten()]
    widths = [inputs, *hidden]
    for before, after in zip(widths, hidden, strict=False):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
