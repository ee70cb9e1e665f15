from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.calibration import observe
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import prune_weights
from netwright.reshape.pruning import weight_masks
from netwright.reshape.pruning._ratios import LEVELS, cheapest, distortions, least_distortion
from netwright.reshape.pruning._weight_criteria import magnitude
from netwright.reshape.pruning._weights import matrix, weight_layers, write
from netwright.stages import call
from tests.anatomy.models import built

CRITERIA = ("magnitude", "wanda", "sparsegpt")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                         nn.Linear(16, 4))


def grid(dimensions):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return nn.Sequential(kind(4, 8, 3, padding="same"), nn.ReLU(),
                         kind(8, 8, 3, stride=2, dilation=2, padding=2, padding_mode="circular"),
                         nn.Flatten(), nn.LazyLinear(3))


def correlated(rows=256, width=12):
    torch.manual_seed(1)
    return torch.randn(rows, width) @ torch.randn(width, width) + 1


def zeros(layer):
    return int((layer.weight == 0).sum())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_every_layer_loses_its_share_to_one_weight(criterion, sparsity):
    model = mlp()
    before = deepcopy(model.state_dict())
    sparse = prune_weights(model, correlated(), sparsity, criterion=criterion)
    for i in (0, 2, 4):
        assert zeros(sparse[i]) == round(sparsity * sparse[i].weight.numel())
        assert torch.equal(sparse[i].bias, model[i].bias)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_magnitude_zeroes_the_smallest_of_a_layer_and_wanda_of_each_row():
    model, x = mlp(), correlated()
    weight = model[0].weight.detach()
    sparse = prune_weights(model, x, 0.5)
    largest = weight.abs().flatten().sort().values[-96:]
    assert torch.equal(sparse[0].weight != 0, weight.abs() >= largest[0])
    sparse = prune_weights(model, [x[:100], x[100:]], 0.5, criterion="wanda")
    scores = weight.abs() * x.norm(dim=0)
    for row in range(16):
        kept = set(scores[row].argsort(descending=True)[:6].tolist())
        assert set(sparse[0].weight[row].nonzero().flatten().tolist()) == kept
    assert torch.equal(sparse[0].weight, weight * (sparse[0].weight != 0))


def test_the_second_order_criterion_is_least_in_what_layers_give():
    model, x = mlp(), correlated()
    x[:, :2] *= 10  # features that stand out, which sizes of weights know nothing of
    found = {}
    for criterion in CRITERIA:
        sparse = prune_weights(model, x, 0.5, criterion=criterion)
        found[criterion] = float((sparse[0](x) - model[0](x)).square().mean().detach())
    assert found["sparsegpt"] < 0.8 * found["wanda"]
    assert found["wanda"] < found["magnitude"]


def test_later_stages_are_pruned_by_what_the_pruned_ones_before_make():
    model, x = mlp(), correlated()
    sparse = prune_weights(model, x, 0.5, criterion="sparsegpt")
    after = deepcopy(model)
    after[0].load_state_dict(sparse[0].state_dict())
    alone = prune_weights(after, x, 0.5, criterion="sparsegpt", layers=["2"])
    assert torch.allclose(alone[2].weight, sparse[2].weight, atol=1e-6)
    other = prune_weights(model, x, 0.5, criterion="sparsegpt", layers=["2"])
    assert not torch.allclose(other[2].weight, sparse[2].weight, atol=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (3, 4), (1, 4)])
def test_n_of_m_side_by_side_stay(criterion, pattern):
    n, m = pattern
    sparse = prune_weights(mlp(), correlated(), criterion=criterion, pattern=pattern)
    for i in (0, 2, 4):
        kept = (sparse[i].weight != 0).view(-1, m).sum(1)
        assert kept.eq(n).all()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_of_every_grid_in_groups_of_channels(criterion, dimensions):
    model, x = grid(dimensions), torch.randn(6, 4, *[7] * dimensions)
    model(x)
    sparse = prune_weights(model, x, criterion=criterion, pattern=(2, 4))
    for i in (0, 2):
        kept = (sparse[i].weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert kept.eq(2).all()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_what_a_convolution_takes_times_its_matrix_is_its_output(dimensions):
    model, x = grid(dimensions), torch.randn(6, 4, *[7] * dimensions)
    y = model(x)
    layer, h = model[2], model[:2](x)
    square = observe(layer, [h], statistics=["gram"])[""]
    order = nw.reshape.pruning._weights.by_channel(layer, square.gram).float()
    weight = matrix(layer)
    expected = (weight @ order @ weight.T).diagonal()
    got = (layer(h) - layer.bias.view(1, -1, *[1] * dimensions)).transpose(0, 1).flatten(1)
    assert torch.allclose(got.square().mean(1), expected, rtol=1e-4)
    write(layer, weight)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet", "convnext"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_architectures_keep_their_vocabulary_and_come_back_from_disk(name, criterion, tmp_path):
    model, x = built(name)
    sparse = prune_weights(model, x, 0.5, criterion=criterion).eval()
    pruned = {f"{layer}.weight" for layer in nw.changes(sparse)[-1].decision["layers"]}
    masks = weight_masks(sparse)
    assert pruned == set(masks)
    assert 0.45 < masks.density() < 0.56
    for key, parameter in model.named_parameters():
        assert key in pruned or torch.equal(sparse.get_parameter(key), parameter)
    nw.save(sparse, tmp_path)
    again = nw.load(tmp_path, model)
    assert torch.equal(call(again, x), call(sparse, x))
    assert weight_masks(again).keys() == masks.keys()
    if hasattr(model, "save_pretrained"):
        plain = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(call(plain, x), call(sparse, x))


def test_padding_decides_nothing():
    model, _ = built("llama")
    ids = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    for criterion in ("wanda", "sparsegpt"):
        one, other = (prune_weights(model, {"input_ids": ids.where(mask > 0, filler),
                                            "attention_mask": mask}, criterion=criterion)
                      for filler in (0, 7))
        for name in weight_masks(one):
            assert torch.allclose(one.get_parameter(name), other.get_parameter(name), atol=1e-5)


def test_masks_are_held_in_training():
    sparse = prune_weights(mlp(), correlated(), 0.5, criterion="sparsegpt")
    masks = weight_masks(sparse)
    optimizer = torch.optim.AdamW(sparse.parameters(), 1e-2, weight_decay=0.1)
    masks.hold(sparse, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        sparse(correlated()).square().mean().backward()
        optimizer.step()
    assert {k: t.tolist() for k, t in weight_masks(sparse).items()} == {
        k: t.tolist() for k, t in masks.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_dtypes_stay(dtype, criterion):
    model = mlp().to(dtype)
    sparse = prune_weights(model, correlated().to(dtype), 0.5, criterion=criterion)
    assert sparse[0].weight.dtype == dtype
    assert zeros(sparse[0]) == 96


def test_what_is_tied_frozen_or_dead_stays_so():
    model = mlp()
    model[2].weight.requires_grad_(False)
    x = correlated()
    x[:, 3] = 0
    for criterion in CRITERIA:
        sparse = prune_weights(model, x, 0.5, criterion=criterion)
        assert not sparse[2].weight.requires_grad
        assert sparse(x).isfinite().all()
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    sparse = prune_weights(tied, torch.randn(64, 8), 0.5, criterion="sparsegpt")
    assert sparse[0].weight is sparse[2].weight
    assert zeros(sparse[0]) == 32
    assert "2" in nw.changes(sparse)[-1].decision["left"]


def test_a_model_that_is_no_chain_of_stages_is_pruned_as_one():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x) if float(x.detach().sum()) > 1e9 else self.a(x) * self.b(x)

    sparse = prune_weights(Twins(), torch.randn(32, 6), 0.5, criterion="sparsegpt")
    assert zeros(sparse.a) == zeros(sparse.b) == 18


def test_layers_that_never_run_are_left_and_named():
    model = mlp()
    model.aside = nn.Linear(4, 4)
    model.__class__ = type("Partly", (nn.Sequential,), {
        "forward": lambda self, x: self[4](self[3](self[2](self[1](self[0](x)))))})
    sparse = prune_weights(model, correlated(), 0.5, criterion="wanda")
    assert list(nw.changes(sparse)[-1].decision["left"]) == ["aside"]


def test_it_is_said_what_gets_smaller():
    note = nw.changes(prune_weights(mlp(), None, 0.5))[-1].decision["note"]
    assert "size on disk unchanged" in note
    assert "packed" in note


# Shares of layers.

def test_dynamic_programming_finds_what_enumeration_finds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(3, 30, (4,), generator=generator).tolist()
        costs = [{round(size * level / 5): float(cost) for level, cost in enumerate(
            torch.rand(5, generator=generator).cumsum(0) - 0.1)} for size in sizes]
        total = sum(sizes) // 2
        sums = {keys: sum(c[k] for c, k in zip(costs, keys, strict=True))
                for keys in product(*costs) if sum(keys) <= total}
        nearest = max(map(sum, sums))
        least = min(cost for keys, cost in sums.items() if sum(keys) == nearest)
        found = tuple(cheapest(costs, total))
        assert sum(found) == nearest
        assert sums[found] == pytest.approx(least)


def test_distortions_rise_and_are_those_of_single_layers():
    model, x = mlp().eval(), correlated()
    layers = weight_layers(model, None).layers
    before = deepcopy(model.state_dict())
    curves = distortions(model, layers, [x[:100], x[100:]], lambda name, w, level:
                         magnitude(w, None, level, None))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for name, curve in curves.items():
        assert len(curve) == len(LEVELS)
        assert curve == sorted(curve)
        alone = prune_weights(model, None, LEVELS[10], layers=[name])
        moved = (alone(x) - model(x)).square().sum(1).mean().detach()
        assert curve[10] >= float(moved) * (1 - 1e-5)
        assert curve[10] == pytest.approx(max(curve[9], float(moved)), rel=1e-4)


def test_shares_meet_the_target_and_spare_the_layer_that_matters():
    model, x = mlp(), correlated()
    with torch.no_grad():
        model[4].weight *= 10  # its errors are errors of the outputs
        model[2].weight[:, 8:] *= 1e-3  # half of these hardly matter
    for share in (0.3, 0.5, 0.8):
        sparse = prune_weights(model, x, share, ratios="distortion")
        gone = sum(zeros(sparse[i]) for i in (0, 2, 4))
        total = sum(sparse[i].weight.numel() for i in (0, 2, 4))
        assert abs(gone - share * total) <= 3
        even = prune_weights(model, x, share)
        errors = [float((m(x) - model(x)).square().mean().detach()) for m in (sparse, even)]
        assert errors[0] <= errors[1]
    assert least_distortion(model, weight_layers(model, None).layers, [x], 0.3, lambda _, w, p:
                            magnitude(w, None, p, None))["2"] > 0.4


def test_shares_of_ones_own():
    sparse = prune_weights(mlp(), None, 0.5, ratios={"0": 0.25, "4": 0.75})
    assert [zeros(sparse[i]) for i in (0, 2, 4)] == [48, 0, 48]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_shares_by_distortion_for_every_criterion(criterion):
    sparse = prune_weights(mlp(), correlated(), 0.6, criterion=criterion, ratios="distortion")
    assert weight_masks(sparse).density() == pytest.approx(0.4, abs=0.01)


# Bad input.

@pytest.mark.parametrize(("changed", "error", "message"), [
    ({"sparsity": 0.0}, ValueError, "sparsity must be"),
    ({"sparsity": 1.0}, ValueError, "sparsity must be"),
    ({"sparsity": float("nan")}, ValueError, "sparsity must be"),
    ({"criterion": "wnada"}, UnknownName, "wanda"),
    ({"ratios": "distorton"}, UnknownName, "distortion"),
    ({"ratios": {"0": 1.5}}, ValueError, "share must be"),
    ({"ratios": {"7": 0.5}}, UnknownName, "7"),
    ({"layers": ["9"]}, UnknownName, "9"),
    ({"pattern": (2, 5)}, ValueError, "pattern must divide"),
    ({"pattern": (4, 4)}, ValueError, "n must be"),
    ({"sparsity": 0.6, "pattern": (2, 4)}, ValueError, "sparsity must be 0.5"),
    ({"pattern": (2, 4), "ratios": "distortion"}, ValueError, "ratios must be"),
    ({"calibration": None, "criterion": "wanda"}, ValueError, "calibration must be given"),
    ({"calibration": [], "criterion": "wanda"}, ValueError, "calibration must hold"),
    ({"calibration": torch.full((4, 12), float("nan")), "criterion": "sparsegpt"}, ValueError,
     "calibration must give finite"),
])
def test_bad_input_is_told(changed, error, message):
    arguments = {"calibration": correlated(), "sparsity": None} | changed
    with pytest.raises(error, match=message):
        prune_weights(mlp(), **arguments)


def test_models_with_nothing_to_prune_or_broken_weights_are_refused():
    with pytest.raises(NothingToReshape, match="layers="):
        prune_weights(nn.Sequential(nn.ReLU()), torch.randn(2, 3))
    broken = mlp()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="2_weight must be finite"):
        prune_weights(broken, correlated())
    model, x = built("llama")
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="embedding"):
        prune_weights(model, x, layers=["lm_head"])


def test_the_head_is_pruned_where_it_is_named():
    model = gpt(16, context=8, width=16)
    x = torch.randint(16, (4, 8))
    assert "4" not in nw.changes(prune_weights(model, x))[-1].decision["layers"]
    assert zeros(prune_weights(model, x, layers=["4"])[4]) == 128
