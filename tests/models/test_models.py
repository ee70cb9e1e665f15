import builtins

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import MissingExtra
from netwright.models import cnn, gcn, gpt, mlp


def test_mlp_is_the_plain_formula():
    network = mlp(6, 3, hidden=(5,), activation=nn.Tanh)
    x = torch.randn(4, 2, 3)
    first, last = network[1], network[3]
    hidden = (x.flatten(1) @ first.weight.T + first.bias).tanh()
    assert torch.allclose(network(x), hidden @ last.weight.T + last.bias, atol=1e-6)


@pytest.mark.parametrize(("network", "shape", "depth"), [
    (mlp(64, 10, hidden=(16, 16, 16)), (2, 1, 8, 8), 4),
    (cnn(1, (8, 8), 10), (2, 1, 8, 8), 3),
    (cnn(3, (9, 13), 10, widths=(4, 4), norm=True), (2, 3, 9, 13), 3),
    (cnn(1, (40,), 10, widths=(8, 8, 8), kernel=5, norm=True), (2, 1, 40), 4),
])
def test_networks_classify_and_are_chains(network, shape, depth):
    x = torch.randn(shape)
    assert network(x).shape == (2, 10)
    assert len(nw.stages(network, x)) == depth


def test_gpt_sees_no_later_character():
    network = gpt(20, context=12).eval()
    x = torch.randint(20, (3, 12))
    changed = x.clone()
    changed[:, 7:] = torch.randint(20, (3, 5))
    before, after = network(x), network(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_gpt_attention_is_pytorchs():
    network = gpt(20, context=6, width=16, heads=2, depth=1)
    block, h = network[1], torch.randn(2, 6, 16)
    own = block._attend(block.query_key_value(h))
    query, key, value = (part.view(2, 6, 2, 8).transpose(1, 2)
                         for part in block.query_key_value(h).split(16, dim=-1))
    theirs = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(own, theirs.transpose(1, 2).reshape(2, 6, 16), atol=1e-6)


def test_gpt_is_a_chain_and_has_a_forward_mode_derivative():
    network, x = gpt(20, context=6, width=16, heads=2), torch.randint(20, (2, 6))
    assert len(nw.stages(network, x)) == 4
    weights = dict(network.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    _, slope = torch.func.jvp(lambda w: torch.func.functional_call(network, w, (x,)),
                              (weights,), (tangents,))
    assert slope.shape == (2, 6, 20)


def test_gcn_classifies_nodes():
    pytest.importorskip("torch_geometric", reason="needs the extra graphs")
    graph = nw.data.karate()
    assert gcn(34, 2)(graph.features, graph.edge_index).shape == (34, 2)


def test_gcn_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.startswith("torch_geometric"):
            raise ImportError("No module named 'torch_geometric'")
        return real(name, *args, **options)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'netwright\[graphs\]'"):
        gcn(34, 2)


def test_errors():
    with pytest.raises(ValueError, match="size must be at least 8, got 6; each axis is halved 3"):
        cnn(1, (6, 8), 10, widths=(4, 4, 4))
    with pytest.raises(ValueError, match=r"size must be \(length,\) or \(height, width\)"):
        cnn(1, (8, 8, 8), 10)
    with pytest.raises(ValueError, match="heads must divide width=64, got 5"):
        gpt(20, context=6, heads=5)
    with pytest.raises(ValueError, match="at most context=6 characters a row, got 7"):
        gpt(20, context=6)(torch.zeros(1, 7, dtype=torch.long))
