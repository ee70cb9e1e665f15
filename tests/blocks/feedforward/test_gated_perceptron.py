from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from netwright.blocks.feedforward import GatedPerceptron


def test_it_is_its_formula():
    part = GatedPerceptron(3, 2).double()
    x = torch.randn(4, 5, 3, dtype=torch.double)
    weight, bias = part.linear.weight, part.linear.bias
    product = x[..., 0] * x[..., 1] * x[..., 2]
    expected = x @ weight[:, :3].T + product[..., None] * weight[:, 3] + bias
    torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-13)


def test_gates_of_other_lengths():
    part = GatedPerceptron(4, 2, gates=[(0, 1), (3,), (1, 2, 3), (2, 2)], bias=False).double()
    x = torch.randn(7, 4, dtype=torch.double)
    a, b, c, d = x.unbind(1)
    expected = torch.stack([a, b, c, d, a * b, d, b * c * d, c * c], 1) @ part.linear.weight.T
    torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_gradients_where_inputs_are_zero(zeros):
    part = GatedPerceptron(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.double)
    x[0, :zeros] = 0
    x.requires_grad_()
    assert gradcheck(part, (x,))
    product = x.detach().prod(-1)
    (grad,) = torch.autograd.grad(part(x).sum(), part.linear.weight)
    torch.testing.assert_close(grad[0], torch.cat([x.detach().sum(0), product.sum()[None]]))


def test_weights_that_compute_xor():
    part = GatedPerceptron(2, 1)
    with torch.no_grad():
        part.linear.weight.copy_(torch.tensor([[1.0, 1.0, -2.0]]))
        part.linear.bias.zero_()
    x = torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]])
    assert torch.equal(part(x)[:, 0], torch.tensor([0., 1., 1., 0.]))


def test_it_learns_xor_and_a_linear_layer_does_not():
    """Measured over 5 seeds: 4 of 4 gated, at most 3 linear."""
    torch.manual_seed(0)
    x = torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]])
    y = torch.tensor([0., 1., 1., 0.])
    right = {}
    for name, part in {"gated": GatedPerceptron(2, 1), "linear": nn.Linear(2, 1)}.items():
        optimizer = torch.optim.Adam(part.parameters(), 0.1)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(part(x)[:, 0], y).backward()
            optimizer.step()
        right[name] = int(((part(x)[:, 0] > 0) == (y > 0)).sum())
    assert right["gated"] == 4 > right["linear"]


def test_dtypes_shapes_and_states():
    part = GatedPerceptron(3, 2)
    for shape in ((3,), (0, 3), (2, 4, 3)):
        assert part(torch.randn(shape)).shape == (*shape[:-1], 2)
    assert deepcopy(part).bfloat16()(torch.randn(5, 3).bfloat16()).dtype == torch.bfloat16
    x, other = torch.randn(5, 3), GatedPerceptron(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert part(x).dtype == torch.bfloat16
    assert list(part.state_dict()) == ["linear.weight", "linear.bias"]
    other.load_state_dict(part.state_dict())
    assert torch.equal(other(x), part(x))


@pytest.mark.parametrize(("run", "says"), [
    (lambda: GatedPerceptron(0, 1), "in_features must be at least 1, got 0"),
    (lambda: GatedPerceptron(2, 0), "out_features must be at least 1, got 0"),
    (lambda: GatedPerceptron(2, 1, gates=[]), "gates must each have an input"),
    (lambda: GatedPerceptron(2, 1, gates=[(0, 1), ()]), "gates must each have an input"),
    (lambda: GatedPerceptron(2, 1, gates=[(0, 2)]), "gates must name inputs from 0 to 1"),
    (lambda: GatedPerceptron(2, 1)(torch.randn(4, 3)), "x must be .*, 2."),
])
def test_what_cannot_be_is_refused(run, says):
    with pytest.raises(ValueError, match=says):
        run()
