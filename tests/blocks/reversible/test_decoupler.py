from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import netwright as nw
from netwright.blocks.reversible import ReversibleDecoupler, TransmissionPrompt
from netwright.errors import CannotReverse


def stirred(network):
    """Move the parameters that begin at or near 0, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return network


def small(**options):
    torch.manual_seed(0)
    return stirred(ReversibleDecoupler((6, 8, 10), columns=3, inputs=1, **options))


def plain_of(network):
    """Return the same network under autograd alone."""
    plain = deepcopy(network)
    plain.columns = nn.Sequential(*plain.columns)
    plain.start = nn.Sequential(*plain.start)
    return plain


def test_a_column_computes_the_papers_update():
    network = small()
    first, second, _ = network.columns
    x, a, b, c = (torch.randn(2, width, size, size)
                  for width, size in ((6, 8), (6, 8), (8, 4), (10, 2)))
    for column, below in ((first, False), (second, True)):
        levels = column.levels
        a_new = levels[0].scale * a + (levels[0](x, b) if below else levels[0](x))
        b_new = levels[1].scale * b + (levels[1](a_new, c) if below else levels[1](a_new))
        c_new = levels[2].scale * c + levels[2](b_new)
        got = column((x, a, b, c))
        assert all(torch.allclose(g, w, atol=1e-5)
                   for g, w in zip(got, (x, a_new, b_new, c_new), strict=True))
        assert all(torch.allclose(g, w, atol=1e-4)
                   for g, w in zip(column.inverse(got), (x, a, b, c), strict=True))


def test_outputs_and_features_have_the_stated_shapes():
    network, image = small(), torch.rand(2, 1, 16, 24)
    assert [tuple(f.shape) for f in network.encode(image)] == [
        (2, 6, 8, 12), (2, 6, 8, 12), (2, 8, 4, 6), (2, 10, 2, 3)]
    transmission, reflection = network(image)
    assert transmission.shape == reflection.shape == image.shape
    assert not torch.allclose(transmission, reflection, atol=1e-3)


def test_the_encoder_gives_the_image_back():
    network, image = small(), torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert float((network.inverse(network.encode(image)) - image).abs().max()) < 1e-4
        network, image = network.double(), image.double()
        features = network.encode(image)
        assert torch.allclose(network.inverse(features), image, atol=1e-10, rtol=0)
        others = network.encode(image.flip(-1))[1:]
        assert not torch.allclose(network.inverse((features[0], *others)), image, atol=0.1)


@pytest.mark.parametrize("needs", [True, False])
def test_gradients_are_those_of_autograd(needs):
    network = small().double()
    plain = plain_of(network)
    image = torch.rand(2, 1, 8, 8).double().requires_grad_(needs)
    before, found = image.detach().clone(), []
    for net in (network, plain):
        image.grad = None
        transmission, reflection = net(image)
        (transmission.square().sum() + reflection.sum()).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None]
                     + ([image.grad] if needs else []))
    assert len(found[0]) == len(found[1]) > 100
    assert all(torch.allclose(a, b, atol=1e-10, rtol=1e-9) for a, b in zip(*found, strict=True))
    assert torch.equal(image, before)


def test_through_autograd_grad():
    network = small().double()
    plain = plain_of(network)
    image = torch.rand(1, 1, 8, 8).double()
    pairs = zip(*(torch.autograd.grad(net(image)[0].square().sum(), list(net.columns.parameters()))
                  for net in (network, plain)), strict=True)
    assert all(torch.allclose(got, wanted, atol=1e-10, rtol=1e-9) for got, wanted in pairs)


def test_memory_does_not_grow_with_columns():
    def saved(columns, reversible=True):
        network = ReversibleDecoupler((6, 8), columns=columns, inputs=1, prompt=False)
        chain = network.columns if reversible else nn.Sequential(*network.columns)
        streams = (torch.randn(4, 6, 8, 8), torch.randn(4, 6, 8, 8), torch.randn(4, 8, 4, 4))
        return nw.measure.cost(_Last(chain), (streams, torch.randn(4, 8, 4, 4)), loss=mse_loss,
                               repeats=1, warmup=0).saved_bytes

    assert saved(6) == saved(2)
    assert saved(6, reversible=False) > 5 * saved(6)


class _Last(nn.Module):

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def forward(self, *streams):
        return self.columns(streams)[-1]


def test_a_scale_of_nothing_is_kept_from_zero_and_still_learns():
    network, image = small().double(), torch.rand(1, 1, 8, 8).double()
    scale = network.columns[1].levels[0].scale
    with torch.no_grad():
        scale.zero_()
    assert torch.allclose(network.inverse(network.encode(image)), image, atol=1e-8)
    network(image)[0].square().sum().backward()
    assert scale.grad.abs().min() > 0
    assert not scale.any()


def test_exact_mode_round_trips_and_bfloat16_run():
    network, image = small(exact=True), torch.rand(1, 1, 8, 8)
    other = ReversibleDecoupler((6, 8, 10), columns=3, inputs=1)
    other.load_state_dict(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(network(image), other(image), strict=True))
    network.bfloat16()(image.bfloat16())[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in network.columns.parameters())


def test_it_learns_to_separate_and_not_where_nothing_tells_the_layers_apart():
    lines = torch.linspace(0, 6.3, 16)

    def mixtures(generator):
        phase = 6.3 * torch.rand(8, 2, generator=generator)
        one = 0.5 + 0.5 * torch.sin(lines + phase[:, :1])[:, None, None, :]
        two = 0.5 * torch.cos(lines + phase[:, 1:])[:, None, :, None]
        return (one + two).expand(8, 1, 16, 16), one.expand(8, 1, 16, 16)

    def error(told):
        torch.manual_seed(0)
        network = ReversibleDecoupler((8, 16), columns=2, inputs=1)
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            image, transmission = mixtures(generator)
            target = transmission if told else transmission.roll(1, 0)
            loss = mse_loss(network(image)[0], target) + network.prompt.loss(image, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        image, transmission = mixtures(generator)
        with torch.no_grad():
            return float(mse_loss(network(image)[0], transmission)
                         / mse_loss(image, transmission))

    assert error(told=True) < 0.5
    assert error(told=False) > 0.8


def test_a_new_prompt_changes_nothing():
    assert torch.equal(TransmissionPrompt(7)(torch.rand(2, 3, 8, 8)), torch.ones(2, 7, 1, 1))


def test_the_rates_are_what_the_estimator_says_and_only_the_loss_teaches_it():
    a, b = torch.tensor([1.2, 0.9, 1.1]), torch.tensor([-0.1, 0.2, 0.0])
    told = nn.Linear(3 * 4, 6)
    with torch.no_grad():
        told.weight.zero_()
        told.bias.copy_(torch.cat([a, b]))
    prompt = stirred(TransmissionPrompt(5, estimator=nn.Sequential(nn.Flatten(), told)))
    with torch.no_grad():
        told.weight.zero_()
        told.bias.copy_(torch.cat([a, b]))
    image = torch.rand(2, 3, 2, 2)
    affine = a.view(1, 3, 1, 1) * image + b.view(1, 3, 1, 1)
    assert float(prompt.loss(image, affine).detach()) < 1e-12
    prompt(image).sum().backward()
    assert told.bias.grad is None
    assert all(p.grad is not None for p in prompt.weigh.parameters())
    prompt.zero_grad()
    prompt.loss(image, torch.rand(2, 3, 2, 2)).backward()
    assert told.bias.grad.abs().min() > 0
    assert all(p.grad is None for p in prompt.weigh.parameters())


def test_a_prompt_of_ones_own_or_none():
    class Halves(nn.Module):
        def forward(self, image):
            return image.new_full((len(image), 6, 1, 1), 0.5)

    image = torch.rand(1, 1, 8, 8)
    none, own = small(prompt=False), small(prompt=Halves())
    own.load_state_dict(none.state_dict())
    assert torch.allclose(own.encode(image)[0], 0.5 * none.encode(image)[0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"at least 12, got 8; .* 4 \* inputs"):
        ReversibleDecoupler((8, 16))
    with pytest.raises(ValueError, match="one number for each level"):
        ReversibleDecoupler((16, 16), depths=(1,))
    with pytest.raises(ValueError, match="columns be at least 1"):
        ReversibleDecoupler((16, 16), columns=0)
    with pytest.raises(CannotReverse, match="multiples of 8 for 3 levels"):
        small()(torch.rand(1, 1, 12, 8))
    with pytest.raises(ValueError, match="two numbers for each colour"):
        TransmissionPrompt(4, estimator=nn.Flatten())(torch.rand(1, 3, 2, 2))
