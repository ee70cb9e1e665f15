import pytest
import torch
from torch import nn

from netwright.generative.flows import Flow, QuadCoupling


def test_each_quarter_is_changed_by_those_before_it():
    torch.manual_seed(0)
    nets = [nn.Conv2d(i, 2, 1) for i in (1, 2, 3)]
    coupling = QuadCoupling(4, nets=nets, clamp=3.0)
    x = torch.randn(2, 4, 3, 3)
    z, log_det = coupling(x)
    assert torch.equal(z[:, :1], x[:, :1])
    total = torch.zeros(2)
    for i, net in enumerate(nets, 1):
        s, t = net(x[:, :i]).chunk(2, 1)
        s = 3 * torch.tanh(s / 3)
        torch.testing.assert_close(z[:, i:i + 1], x[:, i:i + 1] * s.exp() + t)
        total += s.flatten(1).sum(1)
    torch.testing.assert_close(log_det, total)


def test_it_starts_as_the_identity_and_takes_any_number_of_channels():
    for channels in (4, 6, 7, 12):
        x = torch.randn(2, channels, 3, 3)
        assert torch.equal(QuadCoupling(channels, 8)(x)[0], x)
    assert QuadCoupling(7).sizes == (2, 2, 2, 1)


def test_a_condition_goes_to_the_nets():
    class Net(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.layer = nn.Conv2d(inputs + 1, 2, 1)

        def forward(self, x, condition):
            return self.layer(torch.cat([x, condition], 1))

    torch.manual_seed(0)
    flow = Flow([QuadCoupling(4, nets=[Net(1), Net(2), Net(3)])], (4, 2, 2))
    x, one, other = torch.randn(3, 4, 2, 2), torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    z, _ = flow(x, one)
    torch.testing.assert_close(flow.inverse(z, one), x, rtol=0, atol=1e-5)
    assert not torch.allclose(flow.inverse(z, other), x, atol=1e-2)


def test_it_learns_what_the_last_quarter_owes_to_the_first():
    torch.manual_seed(0)

    def images(n):
        x = torch.randn(n, 4, 4, 4)
        x[:, 3] = x[:, 0] + 0.3 * x[:, 3]
        return x
    flow = Flow([QuadCoupling(4, 8)], (4, 4, 4))
    before = flow.log_prob(images(500)).mean()
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        (-flow.log_prob(images(64)).mean()).backward()
        optimizer.step()
    assert flow.log_prob(images(500)).mean() > before + 5


def test_errors():
    with pytest.raises(ValueError, match="channels must be at least 4"):
        QuadCoupling(3)
    with pytest.raises(ValueError, match="clamp must be above 0"):
        QuadCoupling(4, clamp=0)
    with pytest.raises(ValueError, match="nets must be three"):
        QuadCoupling(4, nets=[nn.Identity()])
    with pytest.raises(ValueError, match="x must have 4 channels"):
        QuadCoupling(4)(torch.randn(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"nets\[2\] must return 2 channels"):
        QuadCoupling(4, nets=[nn.Identity()] * 3)(torch.randn(2, 4, 3, 3))
