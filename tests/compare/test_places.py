import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.feedforward import AGLU, GLU, QuadraticLinear
from netwright.blocks.mixing import Affine
from netwright.compare.cells import rehearse
from netwright.compare.changes import changes
from netwright.errors import NothingToReshape
from netwright.generative.flows import ActNorm, AffineCouplingTransform, SplineCouplingTransform
from netwright.tasks import Parts, task


def built(text, name):
    one, change = task(name), changes(text)[0]
    torch.manual_seed(0)
    return change.build(one.network(), one, change.proposals(one, 1)[0]).network


def held(network, kind):
    return [name for name, part in network.named_modules() if isinstance(part, kind)]


@pytest.mark.parametrize(("text", "name", "kind", "where"), [
    ("GLU", "char-gpt", GLU, ["1.mlp_out.block", "2.mlp_out.block"]),
    ("AGLU", "digits-mlp", AGLU, ["2", "4"]),
    ("Affine", "digits-transformer", Affine,
     ["1.attention_norm", "1.mlp_norm", "2.attention_norm", "2.mlp_norm", "3"]),
    ("QuadraticLinear", "digits-mlp", QuadraticLinear, ["1", "3"]),
    ("SelfAttention", "char-gpt", nw.blocks.SelfAttention, ["1.attention", "2.attention"]),
    ("ResMLPBlock", "digits-transformer", nw.blocks.ResMLPBlock, ["1", "2"]),
    ("RaftTokenMixing", "digits-mixer", nw.blocks.RaftTokenMixing,
     ["1.token_mixing", "2.token_mixing"]),
    ("TopKRouter", "char-gpt", nw.blocks.TopKRouter,
     ["1.mlp_out.block.router", "2.mlp_out.block.router"]),
    ("AffineCoupling", "digits-mlp", nw.blocks.AffineCoupling, ["3"]),
    ("ProjectionHead", "digits-mlp", nw.blocks.ProjectionHead, ["5"]),
    ("MLPMixer", "digits-cnn", nw.blocks.MLPMixer, [""]),
])
def test_a_block_is_put_where_it_goes(text, name, kind, where):
    assert held(built(text, name), kind) == where


def test_a_transform_with_a_network_replaces_couplings_and_another_stands_before_them():
    assert len(held(built("SplineCouplingTransform", "moons-flow"), SplineCouplingTransform)) == 4
    network = built("ActNorm", "digits-flow")
    kinds = [type(part) for part in network.flow.transforms]
    assert kinds[1:] == [ActNorm, AffineCouplingTransform] * 4


def test_sizes_are_the_places_own_and_what_is_written_stays():
    network = built("StructuredFeedForward(rank=3, kind='lowrank')", "char-gpt")
    block = network.get_submodule("1.mlp_out.block")
    assert block(torch.zeros(1, 64)).shape == (1, 64)
    assert 3 in [size for p in block.parameters() for size in p.shape]


def test_no_position_sees_a_later_one():
    with pytest.raises(ValueError, match="ResMLPBlock cannot run on task 'char-gpt' because with "
                                         "it a position sees those that come after it"):
        built("ResMLPBlock", "char-gpt")


@pytest.mark.parametrize(("text", "name", "message"), [
    ("GLU", "digits-mlp", "GLU cannot run on task 'digits-mlp' because"),
    ("TokenMixing", "digits-cnn", "its network has no place of the kind 'token mixing'"),
    ("ActNorm", "digits-mlp", "its network is no flow; try moons-flow or digits-flow"),
    ("SAPE", "digits-mlp", "SAPE needs encoding, steps, which a comparison does not know; write"),
    ("RevNet", "char-gpt", "RevNet cannot run on task 'char-gpt' because its inputs are no images"),
    ("mlp", "moons-flow", "learns a density, which it does not give"),
    ("RaftBlock(raft_size=3)", "digits-transformer", "raft_size"),
    ("accuracy", "digits-mlp", "accuracy gives no number with a gradient"),
    ("CrossEntropyLoss + RandomFeatureBoosting", "digits-mlp",
     "RandomFeatureBoosting has a loss of its own; leave out CrossEntropyLoss"),
])
def test_what_has_no_place_says_why(text, name, message):
    with pytest.raises((NothingToReshape, ValueError), match=message):
        built(text, name)


@pytest.mark.parametrize(("text", "name"), [
    ("MSELoss + SGD(momentum=0.5)", "waves-gru"),
    ("mlp(hidden=[4], activation=Tanh)", "digits-mlp"),
    ("LBFGS(max_iter=2)", "digits-linear"), ("upcycle + GLU + Adam", "char-gpt"),
])
def test_the_other_slots_run(text, name):
    one, (change,) = task(name), changes(text)
    rehearse(one, change, change.proposals(one, 1)[0], "cpu")


def test_a_network_of_ones_own():
    batches = [(torch.randn(4, 6, 8), torch.zeros(4, 6).long())]
    own = nw.Task("own", lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
                  Parts(batches, batches, batches))
    change, = changes("Affine")
    assert held(change.build(own.network(), own, {}).network, Affine) == ["1"]
