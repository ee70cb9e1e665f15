import copy
import inspect

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.advise.applicable import INSIDE, PLACES, applicable
from netwright.catalogue import facets
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import cnn, gcn, gpt, mlp

TOKENS = torch.zeros(2, 16, dtype=torch.long)
IMAGES = torch.randn(2, 3, 16, 16)


def everything(network, example, **options):
    found = applicable(network, example, all=True, **options)
    return {change.method.name: change for change in found}


def test_a_transformer_takes_what_changes_its_parts():
    found = everything(gpt(96, context=16), TOKENS)
    for name in ("reshape.swap_feedforward", "reshape.moefy", "blocks.GLU"):
        assert found[name].why == "2 feed-forward layers: 1, 2"
    assert found["reshape.prune_sublayers"].why == "4 sublayers: 1.attention_out, 1.mlp_out, …"
    assert found["reshape.prune_sublayers"].asks == ("calibration data",)
    assert found["rules.MonoForward"].why == "4 stages: 0, 1, …"
    assert found["rules.MonoForward"].asks == ("classes",)


def test_what_is_not_there_is_the_reason():
    found = everything(gpt(96, context=16), TOKENS)
    for name, reason in {
            "reshape.prune_experts": "the network has no mixture of experts",
            "reshape.interpolate_mixer": "the network has no mixer",
            "reshape.fuse_feedforward": "the network has no feed-forward layer behind another",
            "rules.StationaryFeedback": "the network has no recurrent layer",
            "rules.SingleForward": "the input is no graph: nodes, and edges (2, edges)",
            "rules.ReverseDerivativeAscent": "the network has no circuit",
            "blocks.MBConv": "the input is no image but whole numbers (2, 16)",
            "blocks.FourierFeatures": "the input holds no coordinates but whole numbers (2, 16)",
            "blocks.MLPMixer": "the input is no image but whole numbers (2, 16)"}.items():
        assert (found[name].applies, found[name].why) == (False, reason)


def test_what_does_not_apply_is_left_out_unless_asked_for():
    network = cnn(3, (16, 16), 10)
    some, every = applicable(network, IMAGES), applicable(network, IMAGES, all=True)
    assert {*some.names} == {change.method.name for change in every if change.applies}
    assert len(some) < len(every)
    assert all(change.applies for change in some)


def test_a_convolutional_network_takes_no_surgery_of_transformers():
    found = everything(cnn(3, (16, 16), 10), IMAGES)
    assert found["blocks.MBConv"].why == "2 convolutions: 0, 3"
    for name in ("reshape.prune_sublayers", "reshape.reversible", "rules.DiffusionBlocks"):
        assert found[name].why == "the network has no residual stream"
    assert found["reshape.moefy"].why == "the network has no feed-forward layer"


def test_a_chain_of_linear_layers_and_one_that_is_none():
    assert everything(mlp(8, 3, hidden=(4, 4)), torch.randn(2, 8))[
        "rules.BlockCoordinateDescent"].applies
    assert not everything(cnn(3, (16, 16), 10), IMAGES)["rules.BlockCoordinateDescent"].applies
    two = everything(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
                     torch.randn(2, 4))
    assert two["rules.MonoForward"].why.startswith("the network has 2 stages")
    assert two["rules.Backprop"].applies


def test_linear_layers_in_a_row_can_be_multiplied_out():
    row = nn.Sequential(nn.Linear(8, 6), nn.Identity(), nn.Linear(6, 3), nn.ReLU())
    apart = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 8)
    assert everything(row, x)["reshape.reparameterize"].applies
    assert not everything(apart, x)["reshape.reparameterize"].applies


def test_a_graph_and_a_recurrent_network():
    pytest.importorskip("torch_geometric")
    nodes = (torch.randn(5, 4), torch.tensor([[0, 1, 2], [1, 2, 3]]))
    assert everything(gcn(4, 2), nodes)["rules.SingleForward"].why == "a graph of 5 nodes"

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])
    found = everything(Last(), torch.randn(2, 5, 3))
    assert found["rules.StationaryFeedback"].why == "1 recurrent layer: cell"


def test_needs_and_kinds_are_asked_for_as_in_find():
    network = gpt(96, context=16)
    found = applicable(network, TOKENS, need="inference time", kind="reshape", without="training")
    assert "reshape.prune_sublayers" in found.names
    assert {*found.names} <= {
        *nw.find(need="inference time", kind="reshape", without="training").names}
    with pytest.raises(UnknownName, match="inference time"):
        applicable(network, TOKENS, need="inference tim")


def test_every_place_and_every_need_is_known():
    assert set(PLACES) == set(facets.PLACES)
    asked = {"calibration data", "classes", "labels", "several processes", "training"}
    assert set(INSIDE) == set(facets.NEEDS) - asked


def test_the_network_is_left_as_it_was():
    network = gpt(96, context=16).train()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    applicable(network, TOKENS)
    assert network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_is_printed_is_a_table():
    lines = repr(applicable(gpt(96, context=16), TOKENS, kind="reshape")).splitlines()
    assert lines[0].split()[:2] == ["name", "where,"]
    assert any(line.startswith("reshape.prune_sublayers") for line in lines)
    assert repr(applicable(nn.Identity(), torch.randn(2), need="labels", kind="reshape")
                ) == "nothing applies; all=True says why"


@pytest.mark.parametrize(("network", "x"), [
    (gpt(96, context=16, width=16, depth=3), TOKENS), (cnn(3, (16, 16), 10), IMAGES),
    (mlp(16, 4, hidden=(8, 8)), torch.randn(2, 16)),
    (nw.blocks.MLPMixer(3, (16, 16), 10, width=16, depth=2), IMAGES)],
    ids=["gpt", "cnn", "mlp", "mixer"])
def test_a_reshape_that_applies_finds_its_places_and_one_that_does_not_finds_none(network, x):
    tried = 0
    for change in applicable(network.eval(), x, kind="reshape", all=True):
        arguments = given(change.method.value, x)
        if arguments is None:
            continue
        tried += 1
        try:
            change.method.value(network, **arguments)
        except NothingToReshape:
            assert not change.applies, change.method.name
        except ValueError:  # it has found its places, and refuses them for a reason of its own
            assert change.applies, change.method.name
        else:
            assert change.applies, change.method.name
    assert tried >= 5


def given(reshape, x):
    """Return arguments for a reshape, None where those that are known are for another network."""
    said = facets.facets(reshape)
    arguments = {} if said.network else dict(next(iter(said.variants.values()), {}))
    for name, parameter in [*inspect.signature(reshape).parameters.items()][1:]:
        if name in ("calibration", "example"):
            arguments[name] = x
        elif parameter.default is parameter.empty and name not in arguments:
            return None
    return arguments
