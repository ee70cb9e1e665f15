import pytest
import torch
from torch import nn

from netwright.errors import CorruptCheckpoint, UnknownName
from netwright.masks import Masks, n_of_m


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def halves(model: nn.Module) -> Masks:
    return Masks({name: p.abs() > p.abs().median() for name, p in model.named_parameters()
                  if p.ndim > 1})


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(5, 8)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zeros_through_momentum_and_decay(name) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)  # momentum that would move what is masked
    masks = halves(model)
    handle = masks.hold(model, optimizer)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(3):
        step(model, optimizer)
        for key, mask in masks.items():
            p = model.get_parameter(key)
            assert torch.equal(p[~mask], torch.zeros_like(p[~mask]))
            assert not torch.equal(p[mask], before[key][mask])
    handle.remove()
    if name != "lbfgs":
        step(model, optimizer)
        assert any(bool((model.get_parameter(key)[~mask] != 0).any())
                   for key, mask in masks.items())


def test_names_ties_and_parameters_stay() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    names, weight = list(tied.state_dict()), tied["a"].weight
    Masks({"b.weight": torch.eye(4, dtype=torch.bool)}).apply(tied)
    assert list(tied.state_dict()) == names
    assert tied["a"].weight is weight
    assert int((tied["a"].weight != 0).sum()) == 4


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (4, 4)])
def test_each_group_keeps_its_largest(n, m) -> None:
    torch.manual_seed(0)
    for shape in ((6, 16), (3, 4, 2, 2)):
        weight = torch.randn(shape)
        mask = n_of_m(weight, n, m)
        groups, kept = weight.abs().reshape(-1, m), mask.reshape(-1, m)
        assert bool((kept.sum(1) == n).all())
        for group, keep in zip(groups, kept, strict=True):
            rest = group[~keep]
            assert not len(rest) or group[keep].min() >= rest.max()
    assert int(n_of_m(torch.ones(2, 8), n, m).sum()) == 16 * n // m


def test_masks_are_the_same_after_saving_and_take_a_bit_each(tmp_path) -> None:
    torch.manual_seed(0)
    masks = Masks({"a": torch.rand(7, 13) > 0.3, "b": torch.rand(3, 5, 2) > 0.5,
                   "c": torch.ones(1024, 64, dtype=torch.bool)})
    masks.save(tmp_path / "masks")
    again = Masks.load(tmp_path / "masks")
    assert list(again) == list(masks)
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    assert (tmp_path / "masks").stat().st_size < 1024 * 8 + 400
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


def test_density_and_zeros_that_are_there() -> None:
    model = network()
    masks = halves(model)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert masks.density() == kept / (8 * 16 + 16 * 3)
    assert Masks({}).density() == 1.0
    found = Masks.of(masks.apply(model))
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    assert "50.0% kept" in repr(masks)


def test_errors(tmp_path) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"masks\['a'\] must be a tensor of booleans"):
        Masks({"a": torch.ones(2)})
    with pytest.raises(UnknownName, match=r"did you mean 0\.weight"):
        Masks({"0.weigt": torch.ones(2) > 0}).apply(model)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"must have the parameter's shape \(3, 16\)"):
        Masks({"0.weight": torch.zeros(16, 8) > 0, "2.weight": torch.ones(2) > 0}).apply(model)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="optimizer must train"):
        halves(model).hold(model, torch.optim.SGD(network().parameters(), 0.1))
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="m must divide"):
        n_of_m(torch.ones(2, 6), 2, 4)
    with pytest.raises(ValueError, match="n must be"):
        n_of_m(torch.ones(2, 8), 5, 4)
    with pytest.raises(FileNotFoundError, match="path must be"):
        Masks.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(CorruptCheckpoint, match="write them again"):
        Masks.load(tmp_path / "bad")
