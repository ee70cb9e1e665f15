from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.rules.exact.links import run_linked
from netwright.stages import stages

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])


def test_links_chain_to_the_loss_and_share_no_graph():
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3))
    links = run_linked(stages(network), cross_entropy, X, Y)
    assert torch.equal(links[-1].end, cross_entropy(network(X), Y))
    assert links[0].start is X
    for below, above in pairwise(links):
        assert torch.equal(above.start, below.end)
        assert torch.autograd.grad(above.end.sum(), network[0].weight, retain_graph=True,
                                   allow_unused=True) == (None,)


def test_nothing_is_asked_of_what_does_not_learn():
    network = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 3))
    network[0].requires_grad_(False)
    links = run_linked(stages(network), cross_entropy, X, Y)
    assert [link.start.requires_grad for link in links] == [False, False, True]
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        run_linked(stages(network), cross_entropy, X, Y)
