"""A table and a network that learn together: run it with `python docs/examples/own_learner.py`.

Words are looked up in a table that is no PyTorch module: a learner of one's own, which moves its
rows to what the network behind it asks for. Neither knows how the other learns.
"""

import torch
from torch import Tensor, nn

from netwright.formal.learners import Learner, learner

WORDS = ["good", "great", "fine", "bad", "awful", "poor"]


def table(rows: int, width: int, rate: float, generator: torch.Generator) -> Learner:
    """Return a learner whose parameters are rows, one for each word."""
    def update(rows: Tensor, words: Tensor, wanted: Tensor) -> Tensor:
        return rows.index_add(0, words.flatten(), rate * (wanted - rows[words]).flatten(0, -2))

    return Learner(torch.randn(rows, width, generator=generator), lambda rows, words: rows[words],
                   update, lambda rows, words, wanted: words)


def main() -> float:
    """Train on whether a pair of words is praise; return the share of the pairs that is right."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    praise = ((pairs < 3).sum(1) == 2).float().unsqueeze(1)  # both of the two are
    mean = Learner((), lambda _, h: h.mean(1), lambda p, h, wanted: p,
                   lambda _, h, wanted: h + (wanted - h.mean(1)).unsqueeze(1))
    network = learner(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), rate=0.01)
    net = table(len(WORDS), 4, 0.05, generator) >> mean >> network
    for _ in range(300):
        net = net.step(pairs, praise)
    right = ((net(pairs) > 0.5) == praise.bool()).float().mean().item()
    print(f"{100 * right:.0f} % of the pairs are right")
    return right


if __name__ == "__main__":
    main()
