from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.anatomy.replacing import (
    linear_weight,
    plain_paths,
    replace,
    replace_all,
    standing_in,
    without_fused_paths,
    write_linear,
)
from netwright.errors import UnknownName


class Shared(nn.Module):
    """One layer under two names, in a dictionary and a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.table = nn.ModuleDict({"again": self.first, "other": nn.Linear(4, 4)})
        self.row = nn.ModuleList([nn.ReLU(), self.first])

    def forward(self, x):
        return self.row[1](self.table["other"](self.table["again"](self.first(x))))


def test_a_module_is_replaced_wherever_it_stands():
    network = Shared()
    new = nn.Linear(4, 4)
    assert replace(network, "row.1", new) is network
    assert network.first is network.table["again"] is network.row[1] is new
    assert network.table["other"] is not new
    assert isinstance(network.table, nn.ModuleDict)
    assert len(list(network.parameters())) == 4


def test_what_is_put_in_takes_the_mode_over_and_may_hold_what_was_there():
    network = Shared().eval()
    before = network.first
    replace(network, "first", nn.Sequential(before, nn.Dropout()))
    assert network.table["again"][0] is before
    assert not network.first[1].training


def test_the_network_itself_can_be_replaced():
    network, new = nn.Linear(2, 2).eval(), nn.Linear(2, 2)
    assert replace(network, "", new) is new
    assert not new.training


def test_a_name_that_is_not_there_is_refused_before_anything_changes():
    network = Shared()
    with pytest.raises(UnknownName, match="module of the network"):
        replace(network, "table.agian", nn.Identity())
    assert isinstance(network.table["again"], nn.Linear)


def test_all_of_a_kind_at_once():
    network = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    made = {m: nn.Tanh() for m in network.modules() if isinstance(m, nn.ReLU)}
    replace_all(network, made)
    assert [type(m) for m in network[1]] == [nn.Tanh, nn.Linear]
    assert isinstance(network[0], nn.Tanh)
    assert replace_all(network, {network: made[next(iter(made))]}) is made[next(iter(made))]


def test_stubs_stand_in_for_a_while():
    network = Shared()
    before = dict(network.named_modules())
    stubs = {"table.other": nn.Identity(), "first": nn.Linear(3, 3)}
    with standing_in(network, stubs):
        assert network.first is stubs["first"]
        assert network.table["other"] is stubs["table.other"]
        with pytest.raises(RuntimeError):
            network(torch.randn(2, 4))
    assert dict(network.named_modules()) == before


def transposed():
    utilities = pytest.importorskip("transformers.pytorch_utils")
    return utilities.Conv1D(3, 2)  # outputs, inputs


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 3), transposed], ids=["plain", "transposed"])
def test_weights_are_read_and_written_alike(make):
    layer, weight, bias = make(), torch.randn(5, 2), torch.randn(5)
    x = torch.randn(4, 2)
    torch.testing.assert_close(layer(x), x @ linear_weight(layer).T + layer.bias)
    layer.weight.requires_grad_(False)
    write_linear(layer, weight, bias)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
    torch.testing.assert_close(linear_weight(layer), weight)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    write_linear(layer, weight, None)
    torch.testing.assert_close(layer(x), x @ weight.T)
    weight.zero_()
    assert layer.weight.abs().sum() > 0  # it has copies


def test_a_parametrized_layer_is_not_written():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="parametrized"):
        write_linear(layer, torch.zeros(3, 2), None)


def test_encoder_layers_call_their_parts_on_plain_paths():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    seen = []

    class Noted(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    noted = Noted(4, 8).eval()
    noted.load_state_dict(layer.linear1.state_dict())
    layer.linear1 = noted
    with torch.no_grad():
        fused = layer(torch.ones(2, 3, 4))
        assert not seen  # the fused path reads its weight only
        with plain_paths():
            torch.testing.assert_close(layer(torch.ones(2, 3, 4)), fused)
    assert seen == [2]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("part", ["linear1", "linear2", "norm1", "self_attn"])
def test_changed_encoder_layers_stay_off_the_fused_path_and_others_on_it(part):
    layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2))
    kind = layers[1].activation_relu_or_gelu
    setattr(layers[0], part, nn.Sequential(deepcopy(getattr(layers[0], part))))
    without_fused_paths(layers)
    assert [layer.activation_relu_or_gelu for layer in layers] == [0, kind]
    without_fused_paths(layers, every=True)
    assert layers[1].activation_relu_or_gelu == 0
