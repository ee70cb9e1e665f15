import pytest
import torch
from torch import Tensor, nn

from netwright.calibration import stream, watched
from netwright.errors import UnknownName
from netwright.models import gpt
from netwright.signals import apply
from tests.anatomy.models import built

ALL = ("gram", "mean", "absmax")


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 5, 3, padding="same"), nn.Flatten(), nn.Linear(80, 3))


def llama() -> nn.Module:
    return built("llama")[0]


def ids(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, length:] = 0
        found.append({"input_ids": torch.randint(64, (2, 7), generator=generator),
                      "attention_mask": mask})
    return found


NETWORKS = {
    "gpt": (lambda: gpt(16, context=8, depth=2), [torch.randint(16, (3, 8)) for _ in range(3)]),
    "conv": (conv, [torch.randn(2, 3, 8, 8) for _ in range(3)]),
    "llama": (llama, ids(7, 4, 5))}


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_hooks_on_the_whole_model(name) -> None:
    torch.manual_seed(0)
    make, batches = NETWORKS[name]
    model = make()
    seen = {}
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert stream(model, batches, lambda _, taken: seen.update(taken), statistics=ALL) is model
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    model.eval()
    with watched(model, [model], ALL) as (whole, padding), torch.no_grad():
        for x in batches:
            padding[:] = [x["attention_mask"].bool() if isinstance(x, dict) else None]
            apply(model, x)
    assert seen.keys() == whole.keys()
    for key, one in whole.items():
        assert one.rows == seen[key].rows
        for statistic in ALL:
            assert torch.equal(getattr(one, statistic), getattr(seen[key], statistic)), key


def test_padding_is_left_out() -> None:
    seen = {}
    stream(llama(), ids(7, 4, 5), lambda _, taken: seen.update(taken))
    assert {taken.rows for taken in seen.values()} == {3 * 7 + 7 + 4 + 5}


def test_a_gram_matrix_is_the_mean_of_outer_products() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [torch.randn(5, 4), torch.randn(2, 4)]
    seen = {}
    stream(model, batches, lambda _, taken: seen.update(taken), statistics=ALL)
    x = torch.cat(batches).double()
    assert torch.allclose(seen["0"].gram, x.T @ x / 7)
    assert torch.allclose(seen["0"].mean, x.mean(0))
    assert torch.equal(seen["0"].absmax.double(), x.abs().amax(0))
    assert seen["0"].gram.dtype == torch.float64
    assert seen["2"].gram.shape == (8, 8)


def test_patches_of_a_convolution_times_its_weight_are_its_output() -> None:
    model = conv()
    seen = {}
    x = torch.randn(2, 3, 8, 8)
    stream(model, [x], lambda _, taken: seen.update(taken), statistics=ALL)
    made = model[0](x).detach() - model[0].bias.detach()[:, None, None]
    mean = made.mean((0, 2, 3)).double()
    assert torch.allclose(model[0].weight.flatten(1).detach().double() @ seen["0"].mean, mean,
                          atol=1e-6)


def test_later_stages_see_what_was_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, seen = torch.randn(6, 4), {}

    def visit(stage, taken) -> None:
        seen.update(taken)
        if stage.name == "0":
            stage.modules[0].weight.data[2:] = 0
            stage.modules[0].bias.data[2:] = 0
    stream(model, [x], visit)
    gram = seen["2"].gram
    assert bool((gram[2:] == 0).all())
    h = model[:2](x).detach().double()
    assert torch.allclose(gram, h.T @ h / 6)


def test_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="batches must hold"):
        stream(model, [], print)
    with pytest.raises(UnknownName, match="did you mean gram"):
        stream(model, [torch.ones(2, 4)], print, statistics=["grams"])
