import pytest
import torch
from torch import nn

from netwright.blocks import SparseLinear


def pair(density=0.1, inputs=24, outputs=18, bias=True):
    torch.manual_seed(0)
    dense = nn.Linear(inputs, outputs, bias=bias).double()
    mask = torch.rand(outputs, inputs) < density
    mask[3] = False  # an output that reads nothing
    mask[4] = True
    mask[:, 5] = False
    return dense, mask, SparseLinear.from_dense(dense, mask)


@pytest.mark.parametrize("density", [0.08, 0.6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (24,)])
def test_outputs_and_gradients_are_those_of_the_masked_layer(density, bias, shape):
    dense, mask, sparse = pair(density, bias=bias)
    assert sparse.path == ("sparse" if density < 0.2 else "dense")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    above = torch.randn(*shape[:-1], 18, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, dense.weight * mask, dense.bias)
    dx, dw = torch.autograd.grad(expected, [x, dense.weight], above)
    got = sparse(x)
    found = torch.autograd.grad(got, [x, sparse.values], above)
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(found[0], dx, atol=1e-12)
    assert torch.allclose(found[1], dw[mask], atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    _, _, sparse = pair()
    x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, v: torch.func.functional_call(sparse, {"values": v}, x), (x, sparse.values))


def test_there_and_back_is_the_same_weight():
    dense, mask, sparse = pair()
    assert torch.equal(sparse.to_dense(), dense.weight * mask)
    again = SparseLinear.from_dense(nn.Linear(24, 18))
    assert len(again.values) == 24 * 18
    assert again.path == "dense"


def test_a_drawn_layer_holds_its_share_and_trains_as_the_dense_one():
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(40, 30, density=0.1, generator=generator)
    assert len(layer.values) == 120
    weight = layer.to_dense().detach().clone().requires_grad_()
    mask, bias = weight.detach() != 0, layer.bias.detach().clone().requires_grad_()
    x, y = torch.randn(16, 40), torch.randn(16, 30)
    one = torch.optim.Adam(layer.parameters(), 1e-2)
    other = torch.optim.Adam([weight, bias], 1e-2)
    for _ in range(5):
        for optimizer, out in ((one, lambda: layer(x)),
                               (other, lambda: nn.functional.linear(x, weight * mask, bias))):
            optimizer.zero_grad()
            (out() - y).square().mean().backward()
            optimizer.step()
    assert torch.allclose(layer.to_dense(), weight * mask, atol=1e-5)


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="density"):
        SparseLinear(4, 4, density=0)
    with pytest.raises(TypeError, match="linear layer"):
        SparseLinear.from_dense(nn.ReLU())
    with pytest.raises(ValueError, match="mask must be"):
        SparseLinear.from_dense(nn.Linear(4, 3), torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="last axis"):
        SparseLinear(4, 4)(torch.randn(2, 5))
