from itertools import product

import pytest
import torch
from torch import nn

from netwright.sparse import subset_sum_network
from netwright.sparse.subset_sum_network import nearest_subsets


def test_the_nearest_sum_is_that_of_all_subsets_gone_through():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 9):
        numbers = torch.rand(12, n, generator=generator) * 2 - 1
        wanted = torch.rand(12, generator=generator) * 3 - 1.5
        found = nearest_subsets(numbers, wanted)
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        errors = ((found * numbers).sum(1) - wanted).abs()
        every = torch.tensor(list(product([0.0, 1.0], repeat=n)))
        least = (numbers @ every.T - wanted[:, None]).abs().min(1).values
        assert torch.allclose(errors, least, atol=1e-6)


def test_errors_fall_with_the_pool_exponentially_and_far_below_random_subsets():
    torch.manual_seed(0)
    target = nn.Linear(4, 3)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 4)
    errors = []
    for width in (4, 8, 12, 16):
        found = subset_sum_network(target, width, generator=torch.Generator().manual_seed(1))
        errors.append(float((found(grid) - target(grid)).abs().max().detach()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_nothing_but_what_stays_is_chosen():
    target = nn.Linear(3, 2)
    one, other = (subset_sum_network(nn.Linear(3, 2) if i else target, 6,
                                     generator=torch.Generator().manual_seed(0)) for i in range(2))
    assert torch.equal(one[0].weight, other[0].weight)
    both = (one[2].weight != 0) & (other[2].weight != 0)
    assert torch.equal(one[2].weight[both], other[2].weight[both])
    for width in (0, 21):
        with pytest.raises(ValueError, match="width"):
            subset_sum_network(target, width)
