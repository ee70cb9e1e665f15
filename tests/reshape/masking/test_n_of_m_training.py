import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape.masking.n_of_m_training import Fading, advance
from netwright.sparse import finish_n_of_m, n_of_m_training


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def run(model, steps=10):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = torch.randn(16, 8, 6, 6), torch.randn(16, 4)
    losses = []
    for step in range(steps):
        advance(model, step / steps)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("decay", ["mask", "structure", "sr-ste"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 8), (3, 4)])
def test_groups_have_n_of_m_in_the_end_along_the_channels(decay, n, m):
    model = n_of_m_training(network(), n, m, decay=decay)
    losses = run(model)
    assert losses[-1] < losses[0]
    x = torch.randn(2, 8, 6, 6)
    expected = advance(model.eval(), 1.0)(x)
    finished = finish_n_of_m(model).eval()
    assert torch.equal(finished(x), expected)
    assert isinstance(finished[0], nn.Conv2d)
    for layer in (finished[0], finished[3]):
        groups = (layer.weight != 0).movedim(1, -1).reshape(-1, m).sum(1)
        assert groups.eq(n).all()


def test_a_mask_that_has_not_begun_to_fade_is_the_dense_model_bit_for_bit():
    dense, x = network(), torch.randn(4, 8, 6, 6)
    model = n_of_m_training(dense)
    assert torch.equal(model(x), dense(x))
    model(x).sum().backward()
    dense(x).sum().backward()
    assert torch.equal(model[3].layer.weight.grad, dense[3].weight.grad)


def test_what_is_masked_fades_linearly_or_exponentially():
    for schedule, share in (("linear", 0.75), ("exponential", 2 ** -2.5)):
        model = advance(n_of_m_training(network(), 1, 4, schedule=schedule), 0.25)
        weight, mask = model[3].layer.weight, model[3].mask(1)
        assert torch.allclose(model[3].faded(weight), weight * (mask + share * (1 - mask)))
        advance(model, 1.0)
        assert torch.equal(model[3].faded(weight), weight * mask)


def test_a_structure_gets_sparser_by_halves():
    layer = Fading(nn.Linear(16, 2), 1, 16, "structure", "linear")
    assert [layer.stage(i / 5) for i in range(6)] == [15, 8, 4, 2, 1, 1]
    assert [Fading(nn.Linear(4, 2), 3, 4, "structure", "linear").stage(p) for p in (0, 1)] == [3, 3]


def test_sr_ste_pulls_what_is_masked_to_zero_and_lets_the_gradient_through():
    model = n_of_m_training(nn.Sequential(nn.Linear(8, 2, bias=False)), 2, 4, decay="sr-ste")
    x, above = torch.randn(3, 8), torch.randn(3, 2)
    model.train()(x).backward(above)
    weight, mask = model[0].layer.weight, model[0].mask(2)
    expected = above.T @ x + 2e-4 * (1 - mask) * weight
    assert torch.allclose(weight.grad, expected, atol=1e-6)


def test_bad_input_is_told():
    for options, error in (({"n": 4}, ValueError), ({"m": 1}, ValueError),
                           ({"m": 5, "layers": ["3"]}, ValueError), ({"m": 7}, ValueError),
                           ({"decay": "msk"}, UnknownName), ({"layers": ["8"]}, UnknownName)):
        with pytest.raises(error):
            n_of_m_training(network(), **options)
    with pytest.raises(ValueError, match="progress"):
        advance(network(), 1.5)
    with pytest.raises(NothingToReshape):
        finish_n_of_m(network())


def test_what_is_finished_comes_back_from_disk(tmp_path):
    model = finish_n_of_m(n_of_m_training(network()))
    nw.save(model, tmp_path)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(nw.load(tmp_path, network())(x), model(x))
