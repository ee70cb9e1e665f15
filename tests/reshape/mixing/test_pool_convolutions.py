import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d

from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape import pool_convolutions


def depthwise(channels=4, kernel=3, **options):
    return nn.Conv2d(channels, channels, kernel, groups=channels, **options)


@pytest.mark.parametrize("layer", [
    depthwise(padding=1), depthwise(kernel=(3, 5), stride=(2, 1), padding=(1, 2)),
    depthwise(kernel=2, stride=2), depthwise(padding="same"), depthwise(padding="valid"),
    depthwise(kernel=3, dilation=2, padding=1), depthwise(kernel=(1, 3), padding=(0, 1))],
    ids=str)
def test_the_pool_looks_where_the_convolution_looked(layer):
    x = torch.randn(2, 4, 9, 11)
    (pool,) = pool_convolutions(nn.Sequential(layer))
    y = pool(x)
    assert y.shape == layer(x).shape
    padding = {"same": 1, "valid": 0}.get(layer.padding, layer.padding)
    assert torch.equal(y, max_pool2d(x, layer.kernel_size, layer.stride, padding, layer.dilation))


def test_an_average_is_of_the_cells_inside():
    x = torch.ones(1, 4, 5, 5)
    (pool,) = pool_convolutions(nn.Sequential(depthwise(padding=1)), operation="average")
    assert torch.equal(pool(x), x)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(pool(x), avg_pool2d(x, 3, 1, 1, count_include_pad=False))


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (2, 4, 8)), (nn.Conv3d, (2, 4, 5, 6, 7))])
def test_other_numbers_of_axes_do(kind, shape):
    model = nn.Sequential(kind(4, 4, 3, padding=1, groups=4))
    for operation in ("max", "average"):
        assert pool_convolutions(model, operation=operation)(torch.randn(shape)).shape == shape


def test_what_mixes_channels_or_sees_one_cell_stays():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), depthwise(), nn.Conv2d(4, 4, 3, groups=2),
                          depthwise(kernel=1), nn.Conv2d(4, 8, 3, groups=4))
    pooled = pool_convolutions(model)
    assert [type(part).__name__ for part in pooled] == ["Conv2d", "MaxPool2d", *["Conv2d"] * 3]
    assert torch.equal(pooled[0].weight, model[0].weight)
    assert sum(p.numel() for p in pooled.parameters()) == sum(
        p.numel() for i, part in enumerate(model) if i != 1 for p in part.parameters())


def test_layers_are_pooled_by_name_and_a_layer_used_twice_in_both_places():
    full, thin = nn.Conv2d(4, 4, 3, padding=1), depthwise(padding=1)
    model = nn.Sequential(full, nn.ReLU(), full, thin)
    pooled = pool_convolutions(model, layers=["0"])
    assert isinstance(pooled[0], nn.MaxPool2d)
    assert pooled[2] is pooled[0]
    assert isinstance(pooled[3], nn.Conv2d)


def test_modes_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), depthwise()).eval()
    assert not any(part.training for part in pool_convolutions(model).modules())


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_lets_a_network_see_neighbours_which_the_control_does_not(seed):
    torch.manual_seed(seed)
    # Two bright cells side by side, or apart: the same cells to whatever looks at one at a time.
    x, y = torch.zeros(64, 1, 8, 8), torch.arange(64) % 2
    for image, label in zip(x, y, strict=True):
        image[0, int(torch.randint(8, ())), [1, 5 if label else 2]] = 1.0

    def network(middle):
        return nn.Sequential(nn.Conv2d(1, 8, 1), middle, nn.Conv2d(8, 8, 1), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    def loss_after_training(model):
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()
    assert loss_after_training(pool_convolutions(network(depthwise(8, padding=1)))) < 0.5
    assert loss_after_training(network(nn.Identity())) > 0.69


@pytest.mark.parametrize(("model", "options", "error", "match"), [
    (nn.Linear(3, 3), {}, NothingToReshape, "model must have a depthwise convolution, got 0"),
    (nn.Conv2d(4, 4, 3), {}, NothingToReshape, "got 1 convolutions in Conv2d and none"),
    (nn.Sequential(depthwise()), {"layers": ["1"]}, UnknownName, "no convolution is called '1'"),
    (nn.Sequential(depthwise()), {"operation": "median"}, UnknownName, "no operation is called"),
    (nn.Sequential(nn.Conv2d(4, 8, 3)), {"layers": ["0"]}, ValueError, "'0' from 4 to 8"),
    (nn.Sequential(depthwise(padding=2)), {}, ValueError, "padding of at most half their window"),
    (nn.Sequential(depthwise(kernel=2, padding="same")), {}, ValueError, "the same on both sides"),
    (nn.Sequential(depthwise(dilation=2)), {"operation": "average"}, ValueError, "no dilation"),
])
def test_what_cannot_be_pooled_is_named(model, options, error, match):
    with pytest.raises(error, match=match):
        pool_convolutions(model, **options)
