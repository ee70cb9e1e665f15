import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["subset_sum_network"]

MOST = 20  # products for which all subsets are gone through


@method("companion")
@torch.no_grad()
def subset_sum_network(target: nn.Linear, width: int = 10, *,
                       generator: Generator | None = None) -> nn.Sequential:
    """Return a random network of two layers, pruned so that it computes what `target` does.

    w_ij x_i = w_ij relu(x_i) − w_ij relu(−x_i), and each w is nearly a sum of some of the products
    u_k v_jk of `width` random hidden units: S = argmin_S |w_ij − Σ_{k in S} u_k v_jk|.

    Hidden units read one input each, with u uniform on (0, 1], `width` with x_i and as many with
    −x_i; v is uniform on [−1, 1], and nothing but which v stay is chosen. All subsets are gone
    through, in two halves that meet in the middle. The error falls about exponentially with
    `width`, for weights no larger than 1.

    Args:
        target: the layer that is to be computed.
        width: random products for each of its weights and signs.
        generator: draws them.

    Shapes: hidden layer (2 · width · inputs, inputs), output layer (outputs, 2 · width · inputs).

    Raises:
        ValueError: `width` is not from 1 to 20.

    Paper: Malach, Yehudai, Shalev-Schwartz, Shamir, 2020, Proving the Lottery Ticket Hypothesis:
    Pruning is All You Need. Pensia, Rajput, Nagle, Vishwakarma, Papailiopoulos, 2020, Optimal
    Lottery Tickets via Subset Sum.

    >>> target = nn.Linear(3, 2)
    >>> found, x = subset_sum_network(target, 12), torch.rand(5, 3) * 2 - 1
    >>> bool((found(x) - target(x)).abs().max() < 0.05)
    True
    """
    checks.between(1, MOST, whole=True, width=width)
    outputs, inputs = target.weight.shape
    hidden = nn.Linear(inputs, 2 * width * inputs, bias=False)
    out = nn.Linear(2 * width * inputs, outputs, bias=target.bias is not None)
    u = 1 - torch.rand(inputs, 2, width, generator=generator)
    v = torch.rand(outputs, inputs, 2, width, generator=generator) * 2 - 1
    signs = torch.tensor([1.0, -1.0])
    reads = torch.eye(inputs)[:, None, None, :] * (u * signs[:, None])[..., None]
    hidden.weight.copy_(reads.reshape(-1, inputs))
    wanted = target.weight.detach()[:, :, None] * signs
    out.weight.copy_((v * nearest_subsets(u * v, wanted)).reshape(outputs, -1))
    if target.bias is not None:
        out.bias.copy_(target.bias)
    return nn.Sequential(hidden, nn.ReLU(), out)


def nearest_subsets(numbers: Tensor, wanted: Tensor) -> Tensor:
    """Return 1 at the numbers whose sum is nearest to what is wanted, else 0.

    Shapes: numbers (*, n); wanted (*).

    >>> nearest_subsets(torch.tensor([[1.0, 2.0, 4.0, -8.0]]), torch.tensor([-2.9]))
    tensor([[1., 0., 1., 1.]])
    """
    n = numbers.shape[-1]
    flat, goals = numbers.reshape(-1, n).double(), wanted.reshape(-1, 1).double()
    first = _subsets(n // 2)
    second = _subsets(n - n // 2)
    sums, order = (flat[:, :n // 2] @ first.T).sort(dim=1)
    others = flat[:, n // 2:] @ second.T
    rest = goals - others
    above = torch.searchsorted(sums, rest.contiguous()).clamp(max=sums.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    errors = torch.stack([(sums.gather(1, place) - rest).abs() for place in (below, above)])
    best = errors.min(0)
    pick = best.values.argmin(1, keepdim=True)
    place = torch.where(best.indices.gather(1, pick) == 0, below.gather(1, pick),
                        above.gather(1, pick))
    chosen = torch.cat([first[order.gather(1, place)[:, 0]], second[pick[:, 0]]], 1)
    return chosen.view(numbers.shape).to(numbers)


def _subsets(n: int) -> Tensor:
    """Return all subsets of n, one a row of zeros and ones."""
    return (torch.arange(2 ** n)[:, None] >> torch.arange(n) & 1).double()
