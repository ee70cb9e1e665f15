from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.reversible import IRevNet, IRevNetBlock, RevNet
from netwright.errors import CannotReverse


def scrambled(network):
    """Give batch norm statistics and scales that are not those of a new network."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
            if "bias" in name or "mean" in name:
                tensor -= 1
    return network


def small(**options):
    return IRevNet((8, 32), (2, 2), 3, inputs=1, **options)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_block_computes_the_papers_formula(stride, dims):
    block = scrambled(IRevNetBlock(4, 4 * stride ** dims, stride=stride, dims=dims)).eval()
    x = torch.randn(2, 8, *(4, 6, 2)[:dims])
    a, b = x.chunk(2, 1)
    wanted = torch.cat([block.down(b), block.down(a) + block.f(b)], 1)
    assert torch.allclose(block(x), wanted, atol=1e-6)


def test_a_bottleneck_is_the_published_one():
    kinds = [type(layer).__name__ for layer in IRevNetBlock(16, 64, stride=2).f]
    assert kinds == ["BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "Dropout",
                     "BatchNorm2d", "ReLU", "Conv2d"]
    first = IRevNetBlock(16, 64, stride=2, first=True).f
    assert [layer.weight.shape for layer in first if isinstance(layer, nn.Conv2d)] == [
        (16, 16, 3, 3), (16, 16, 3, 3), (64, 16, 3, 3)]
    assert first[0].stride == (2, 2)


@pytest.mark.parametrize(("network", "size"), [
    (lambda: IRevNet((16, 64), (2, 3), 3), (3, 16, 8)),
    (lambda: IRevNet(None, (2, 2, 1), 3, injective_pad=False), (3, 16, 16)),
    (lambda: IRevNet((4, 8), (1, 1), 3, dims=1, inputs=1), (1, 8)),
    (lambda: IRevNet((8, 64), (1, 1), 3, dims=3, inputs=1), (1, 4, 8, 4)),
    (lambda: IRevNet((4, 32), (1, 2), 3, inputs=3, initial=1, strides=(1, 2)), (3, 4, 4)),
])
def test_the_features_give_the_image_back(network, size):
    network = scrambled(network()).double().eval()
    x = torch.rand(3, *size).double()
    features = network.features(x)
    assert network(x).shape == (3, 3)
    assert torch.allclose(network.inverse(features), x, atol=1e-10, rtol=0)
    single = network.float()(x.float())
    assert torch.allclose(single, network.double()(x).float(), atol=1e-4)
    x = x.float()
    network = network.float()
    with torch.no_grad():
        assert float((network.inverse(network.features(x)) - x).abs().max()) < 1e-4


def test_without_zeros_the_features_are_as_many_numbers_and_the_volume_is_kept():
    network = scrambled(IRevNet(None, (2, 1), 3, inputs=1, initial=2)).double().eval()
    x = torch.rand(64).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: network.features(x.view(1, 1, 8, 8)).flatten(), x)
    assert jacobian.shape == (64, 64)
    assert abs(float(torch.linalg.slogdet(jacobian.detach()).logabsdet)) < 1e-10


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("kind", ["irevnet", "revnet"])
def test_gradients_and_statistics_are_those_of_autograd(kind, needs):
    network = (small(dropout=0.2) if kind == "irevnet"
               else RevNet((4, 8), (2, 2), 3, inputs=1, dropout=0.2)).double()
    plain = deepcopy(network)
    for name, child in list(plain.named_children()):
        if isinstance(child, nw.blocks.reversible.ReversibleSequential):
            setattr(plain, name, nn.Sequential(*child))
    x = torch.rand(4, 1, 8, 8).double().requires_grad_(needs)
    before, y = x.detach().clone(), torch.tensor([0, 1, 2, 0])
    found = []
    for net in (network, plain):
        x.grad = None
        torch.manual_seed(0)
        nn.functional.cross_entropy(net(x), y).backward()
        found.append([*[p.grad for p in net.parameters()], *net.buffers(),
                      *([x.grad] if needs else [])])
    assert all(torch.allclose(a, b, atol=1e-10, rtol=1e-10) for a, b in zip(*found, strict=True))
    assert torch.equal(x, before)
    torch.manual_seed(0)
    grads = torch.autograd.grad(network(x).sum(), list(network.parameters()))
    torch.manual_seed(0)
    wanted = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("make", [lambda d: IRevNet((8, 32), (d, d), 3, inputs=1),
                                  lambda d: RevNet((8, 16), (d, d), 3, inputs=1)])
def test_memory_does_not_grow_with_depth(make):
    batch = torch.rand(64, 1, 8, 8), torch.randint(3, (64,))

    def cost(network):
        return nw.measure.cost(network, batch, repeats=1, warmup=0)

    shallow, deep = cost(make(1)), cost(make(4))
    assert deep.saved_bytes < 1.01 * shallow.saved_bytes
    assert deep.working_bytes < 1.1 * shallow.working_bytes
    plain = make(4)
    for name, child in list(plain.named_children()):
        if isinstance(child, nw.blocks.reversible.ReversibleSequential):
            setattr(plain, name, nn.Sequential(*child))
    assert cost(plain).saved_bytes > 3 * deep.saved_bytes


def test_the_rule_trains_it_like_backpropagation():
    network, batch = small(), (torch.rand(8, 1, 8, 8), torch.randint(3, (8,)))
    gradients = []
    for rule in (nw.rules.Reversible, nw.rules.Backprop):
        trained = deepcopy(network).double()
        rule(trained)(batch[0].double(), batch[1])
        gradients.append([p.grad for p in trained.parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("make", [lambda: small(), lambda: RevNet((8, 16), (1, 1), 3, inputs=1)])
def test_it_learns_digits_and_with_shuffled_labels_does_not(make):
    data = nw.data.digits()
    few = data.y_train < 3
    x, y = data.x_train[few], data.y_train[few]
    held_out = data.y_test < 3

    def accuracy(y):
        torch.manual_seed(0)
        network = make()
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for k in range(24):
            part = slice(k % 6 * 64, k % 6 * 64 + 64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
        network.eval()
        right = network(data.x_test[held_out]).argmax(1) == data.y_test[held_out]
        if isinstance(network, IRevNet):
            with torch.no_grad():
                back = network.inverse(network.features(data.x_test[held_out]))
            assert float((back - data.x_test[held_out]).abs().max()) < 1e-4
        return float(right.float().mean())

    assert accuracy(y) > 0.7
    assert accuracy(y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]) < 0.6


def test_state_round_trips_and_bfloat16_and_exact_mode_run():
    network = small(exact=True)
    copy = small()
    copy.load_state_dict(network.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(copy.eval()(x), network.eval()(x))
    network = network.train().bfloat16()
    network(x.bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_stages_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="one number for each stage"):
        IRevNet((16, 64), (2,), 10)
    with pytest.raises(ValueError, match="one number for each stage"):
        IRevNet((16, 64), (2, 2), 10, strides=(1,))
    with pytest.raises(ValueError, match=r"stage 1 gets 32 channels.*at least 64"):
        IRevNet((16, 32), (2, 2), 10)
    with pytest.raises(ValueError, match="multiple of 4"):
        IRevNet((16, 66), (2, 2), 10)
    with pytest.raises(ValueError, match="needs 20 channels of zeros"):
        IRevNet((16, 64), (2, 2), 10, injective_pad=False)
    with pytest.raises(ValueError, match=r"channels must be inputs \* stride \*\* dims"):
        IRevNetBlock(4, 8, stride=2)
    with pytest.raises(ValueError, match="dims must be between 1 and 3"):
        IRevNet((16,), (2,), 10, dims=4)
    with pytest.raises(CannotReverse, match="multiples of factor=2"):
        small()(torch.rand(1, 1, 6, 6))


def test_revnets_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="channels must be even"):
        RevNet((3,), (1,), 2)
    with pytest.raises(ValueError, match="one number for each stage"):
        RevNet((4,), (1, 1), 2)
