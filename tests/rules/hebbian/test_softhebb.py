import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from netwright.data import digits
from netwright.measure import cost
from netwright.rules import SoftHebb
from netwright.stages import stages

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
IMAGES = torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(1)).double()


class Triangle(nn.Module):
    """What stands out above the mean of the channels."""

    def forward(self, h):
        return (h - h.mean(1, keepdim=True)).relu()


def mlp(**options):
    return nn.Sequential(nn.Linear(5, 8, **options), nn.ReLU(), nn.Linear(8, 7, **options),
                         nn.ReLU(), nn.Linear(7, 3))


def by_hand(patches, w, temperature, *, anti_hebbian=True, power=0.5):
    """The step, summed up patch by patch and unit by unit."""
    change = torch.zeros_like(w)
    for x in patches:
        u = w @ x
        y = torch.softmax(u / temperature, 0)
        for k in range(len(w)):
            sign = -1 if anti_hebbian and k != u.argmax() else 1
            change[k] += sign * y[k] * (x - u[k] * w[k])
    rate = (w.norm(dim=1) - 1).abs() ** power
    return rate[:, None] * change / change.abs().max()


@pytest.mark.parametrize("anti_hebbian", [True, False])
@pytest.mark.parametrize("initial_norm", [None, 25.0])
def test_dense_steps_equal_explicit_sums(anti_hebbian, initial_norm):
    rule = SoftHebb(mlp().double(), temperature=[0.5, 2.0], anti_hebbian=anti_hebbian,
                    initial_norm=initial_norm)
    x = X.double()
    rule(x, Y)
    for layer, inputs, temperature in ((rule.network[0], x, 0.5),
                                       (rule.network[2], rule.network[:2](x).detach(), 2.0)):
        expected = by_hand(inputs, layer.weight.detach(), temperature, anti_hebbian=anti_hebbian)
        torch.testing.assert_close(layer.weight.grad, -expected)
        assert layer.bias.grad is None


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": "same", "bias": False},
    {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_convolutions_steps_equal_explicit_sums_over_patches(options):
    layer = nn.Conv2d(4, 6, 3, **options).double()
    rule = SoftHebb(nn.Sequential(layer, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                                  nn.Flatten(), nn.Linear(6, 3).double()), temperature=0.7,
                    initial_norm=2)
    rule(IMAGES, Y)
    padded = IMAGES
    if layer.padding_mode == "reflect":
        padded = functional.pad(IMAGES, (1, 1, 1, 1), mode="reflect")
    elif layer.padding != (0, 0):
        padded = functional.pad(IMAGES, (1, 1, 1, 1))
    patches = functional.unfold(padded, 3, dilation=layer.dilation, stride=layer.stride)
    patches = patches.transpose(1, 2).flatten(0, 1)
    expected = by_hand(patches, layer.weight.detach().flatten(1), 0.7)
    torch.testing.assert_close(layer.weight.grad.flatten(1), -expected)


def test_channels_of_all_groups_compete_and_see_their_own_group():
    layer = nn.Conv2d(4, 6, 1, groups=2, bias=False).double()
    rule = SoftHebb(nn.Sequential(layer, nn.Flatten(), nn.Linear(6 * 49, 3).double()),
                    initial_norm=None)
    rule(IMAGES, Y)
    w = layer.weight.detach().flatten(1)
    dense = torch.zeros(6, 4).double()
    dense[:3, :2], dense[3:, 2:] = w[:3], w[3:]
    step = by_hand(IMAGES.movedim(1, -1).flatten(0, 2), dense, 1.0)
    own = torch.cat([step[:3, :2], step[3:, 2:]])
    got = -layer.weight.grad.flatten(1)
    rate = (w.norm(dim=1) - 1).abs().sqrt()[:, None]
    torch.testing.assert_close(got, rate * (own / rate) / (own / rate).abs().max())


def test_convolutions_over_one_axis_and_three_are_linear_layers_where_they_see_all():
    for conv in (nn.Conv1d, nn.Conv3d):
        network = nn.Sequential(conv(5, 8, 1), nn.Flatten(), nn.Linear(8, 3))
        dense = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
        dense[0].weight.data.copy_(network[0].weight.data.flatten(1))
        dense[0].bias.data.copy_(network[0].bias.data)
        SoftHebb(network, initial_norm=None)(X.view(6, 5, *[1] * (network[0].weight.ndim - 2)), Y)
        SoftHebb(dense, initial_norm=None)(X, Y)
        torch.testing.assert_close(network[0].weight.grad.flatten(1), dense[0].weight.grad)


def test_the_last_stage_descends_the_loss_and_no_gradient_leaves_it():
    network = mlp()
    rule = SoftHebb(network)
    h = network[:4](X).detach()
    expected = cross_entropy(network[4](h), Y)
    gradients = torch.autograd.grad(expected, network[4].parameters())
    torch.testing.assert_close(rule(X, Y), expected.detach())
    torch.testing.assert_close([p.grad for p in network[4].parameters()], list(gradients))


def test_hidden_stages_see_neither_labels_nor_later_weights():
    network = mlp()
    rule = SoftHebb(network)
    rule(X, Y)
    first = [network[i].weight.grad.clone() for i in (0, 2)]
    rule.zero_grad()
    with torch.no_grad():
        network[4].weight.mul_(3)
    rule(X, torch.zeros_like(Y))
    assert torch.equal(network[2].weight.grad, first[1])
    rule.zero_grad()
    with torch.no_grad():
        network[2].weight.mul_(3)
    rule(X, Y)
    assert torch.equal(network[0].weight.grad, first[0])


def test_a_bias_takes_no_part_in_the_competition():
    network = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).double()
    rule = SoftHebb(network)
    rule(X.double(), Y)
    before = network[0].weight.grad.clone()
    rule.zero_grad()
    network[0].bias.data.add_(torch.arange(8.0))
    rule(X.double(), Y)
    torch.testing.assert_close(network[0].weight.grad, before)


def test_norms_and_other_parameters_of_hidden_stages_stay():
    network = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8), nn.BatchNorm1d(8), nn.PReLU(),
                            nn.Linear(8, 3))
    SoftHebb(network)(X, Y)
    assert [name for name, p in network.named_parameters() if p.grad is not None] == [
        "1.weight", "4.weight", "4.bias"]


def test_a_layer_in_two_stages_takes_both_steps():
    shared = nn.Linear(5, 5, bias=False)
    rule = SoftHebb(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(5, 3)).double())
    rule(X.double(), Y)
    w, h = shared.weight.detach(), rule.network[:2](X.double()).detach()
    torch.testing.assert_close(-shared.weight.grad, by_hand(X.double(), w, 1) + by_hand(h, w, 1))


@pytest.mark.parametrize("initial_norm", [0.3, 25.0])
def test_lengths_approach_one(initial_norm):
    torch.manual_seed(0)
    rule = SoftHebb(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)), initial_norm=initial_norm)
    x = torch.randn(64, 5)
    optimizer = torch.optim.SGD(rule.parameters(), 0.1)
    far = (rule.layers[0].weight.norm(dim=1) - 1).abs().min()
    for _ in range(800):
        optimizer.zero_grad()
        rule(x, torch.zeros(64, dtype=torch.long))
        optimizer.step()
    assert far > 0.3
    assert (rule.layers[0].weight.norm(dim=1) - 1).abs().max() < 0.01


def test_initial_norm_draws_the_hidden_weights_that_are_trained():
    network = nn.Sequential(nn.Linear(400, 50), nn.Linear(50, 400), nn.Linear(400, 3))
    network[1].requires_grad_(False)
    kept = [p.clone() for p in network.parameters()]
    SoftHebb(network, initial_norm=None)
    assert all(map(torch.equal, network.parameters(), kept))
    SoftHebb(network, generator=torch.Generator().manual_seed(1))
    lengths = network[0].weight.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(25, rel=0.03)
    assert all(map(torch.equal, list(network.parameters())[1:], kept[1:]))
    drawn = network[0].weight.clone()
    SoftHebb(network, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network[0].weight, drawn)


def test_labels_left_out_train_the_hidden_stages_all_the_same():
    network = mlp()
    y = Y.clone()
    y[3:] = -100
    SoftHebb(network)(X, y)
    half = network[4].weight.grad
    other = mlp()
    other.load_state_dict(network.state_dict())
    SoftHebb(other, initial_norm=None)(X[:3], Y[:3])
    torch.testing.assert_close(half, other[4].weight.grad)
    assert not torch.allclose(network[0].weight.grad, other[0].weight.grad)


def test_memory_does_not_grow_with_depth():
    def working_bytes(depth):
        layers = [module for _ in range(depth) for module in (nn.Linear(64, 64), nn.Tanh())]
        rule = SoftHebb(nn.Sequential(*layers, nn.Linear(64, 10)).requires_grad_())
        return cost(rule, (torch.randn(2048, 64), torch.randint(10, (2048,))), repeats=1,
                    warmup=0).working_bytes
    assert working_bytes(12) < working_bytes(4) + 10 * 64 * 64 * 4  # the steps that are kept


def test_features_learned_without_labels_beat_the_same_layers_at_random():
    split = digits()
    x, test = split.x_train.flatten(1), split.x_test.flatten(1)

    def probe(seed, *, learn):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(64, affine=False).eval()
        norm.running_mean, norm.running_var = x.mean(0), x.var(0)
        network = nn.Sequential(norm, nn.Linear(64, 10, bias=False), Triangle(), nn.Linear(10, 10))
        rule = SoftHebb(network)
        hidden = torch.optim.SGD(network[1].parameters(), 0.1)
        for batch in torch.randperm(len(x)).repeat(4).split(20) if learn else ():
            hidden.zero_grad()
            rule(x[batch], torch.zeros(len(batch), dtype=torch.long))  # no labels
            hidden.step()
        a, b = network[:3](x).detach(), network[:3](test).detach()
        a, b = (a - a.mean(0)) / (a.std(0) + 1e-6), (b - a.mean(0)) / (a.std(0) + 1e-6)
        readout = SoftHebb(nn.Sequential(nn.Linear(10, 10)))
        optimizer = torch.optim.Adam(readout.parameters(), 1e-2)
        for batch in torch.randperm(len(x)).repeat(6).split(64):
            optimizer.zero_grad()
            readout(a[batch], split.y_train[batch])
            optimizer.step()
        return (readout.predict(b).argmax(1) == split.y_test).float().mean().item()

    for seed in range(3):
        learned, random = probe(seed, learn=True), probe(seed, learn=False)
        assert learned > random + 0.08  # measured: 0.14 to 0.25


def test_errors():
    with pytest.raises(ValueError, match="stage 0 has Conv2d, Linear; cut it by hand"):
        SoftHebb(stages(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5),
                                      nn.Linear(5, 3)), cuts=["0", "3"]))
    with pytest.raises(ValueError, match="stage 0 has Embedding"):
        SoftHebb(nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 3)))
    with pytest.raises(ValueError, match="stage 0 has ConvTranspose2d"):
        SoftHebb(nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
    for wrong in (0, -1.0, float("nan"), [1.0, 0.0]):
        with pytest.raises(ValueError, match="temperature must be"):
            SoftHebb(mlp(), temperature=wrong)
    with pytest.raises(ValueError, match="one for each of the 2 hidden stages, got 3"):
        SoftHebb(mlp(), temperature=[1, 1, 1])
    with pytest.raises(ValueError, match="norm_power must be at least 0, got -1"):
        SoftHebb(mlp(), norm_power=-1)
    for norm in (0, -25, float("nan")):
        network = mlp()
        before = network[0].weight.clone()
        with pytest.raises(ValueError, match="initial_norm must be"):
            SoftHebb(network, initial_norm=norm)
        assert torch.equal(network[0].weight, before)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LazyLinear(7), nn.Linear(7, 3))
    before = network[0].weight.clone()
    with pytest.raises(ValueError, match=r"stage 2 is lazy; .* or set initial_norm=None"):
        SoftHebb(network)
    assert torch.equal(network[0].weight, before)
    rule = SoftHebb(network, initial_norm=None)
    assert rule(X, Y).isfinite()
    with pytest.raises(RuntimeError, match="4"):
        rule(X[:, :4], Y)
    assert not any(module._forward_hooks for module in network.modules())
