from collections.abc import Sequence

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["GatedPerceptron"]


@method("block", papers=["003-118"], place="linear", takes=("in_features", "out_features"))
class GatedPerceptron(nn.Module):
    """A linear layer that also sees the product of its inputs.

    y = W x + V p + b;  p_g = prod of x_i for i in gate g;  one gate of all inputs where none is
    given.

    One such neuron computes XOR, and its decision border is curved. With two inputs the gate is
    what they do together; with many, the product is near 0 or huge, and gates of few are better.

    Args:
        in_features: size of the last axis of x.
        out_features: size of the last axis of y.
        gates: the inputs that each gate multiplies, by their places.
        bias: whether b is learnt.

    Shapes: x (*, in_features), y (*, out_features); W (out_features, in_features), V
    (out_features, gates).

    Raises:
        ValueError: a size is below 1, there is no gate, one has no inputs or one that x does not
            have, or x has another size.

    Paper: Larabi, 2024, More Consideration for the Perceptron.

    >>> GatedPerceptron(2, 3)(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    places: Tensor

    def __init__(self, in_features: int, out_features: int, *,
                 gates: Sequence[Sequence[int]] | None = None, bias: bool = True) -> None:
        super().__init__()
        checks.count(1, in_features=in_features, out_features=out_features)
        gates = [range(in_features)] if gates is None else gates
        if not len(gates) or any(not len(gate) for gate in gates):
            raise ValueError(f"gates must each have an input, got {gates}; leave them out for one "
                             "gate of all inputs")
        wrong = [place for gate in gates for place in gate if not 0 <= place < in_features]
        if wrong:
            raise ValueError(f"gates must name inputs from 0 to {in_features - 1}, since "
                             f"in_features={in_features}, got {wrong[0]}")
        longest = max(map(len, gates))  # shorter ones are filled with an input that is always 1
        places = [[*gate, *[in_features] * (longest - len(gate))] for gate in gates]
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.linear = nn.Linear(in_features + len(gates), out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out_features) of (*, in_features)."""
        inputs = self.linear.in_features - len(self.places)
        if x.ndim < 1 or x.shape[-1] != inputs:
            raise ValueError(f"x must be (*, {inputs}), since in_features={inputs}, got "
                             f"{tuple(x.shape)}")
        products = nn.functional.pad(x, (0, 1), value=1)[..., self.places].prod(-1)
        y: Tensor = self.linear(torch.cat([x, products.to(x.dtype)], -1))
        return y
