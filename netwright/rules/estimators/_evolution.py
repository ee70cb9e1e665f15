"""CMA-ES by the `cma` package, with everything that it remembers in one tensor."""

from typing import Any

import numpy
import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.errors import MissingExtra

_COUNTS = 7  # the step and six counters stand before the arrays


class Evolution(nn.Module):
    """Search a space of `dimension` numbers for the least loss, a population at a time.

    The state (mean, step, covariance and its roots, both paths, counters) is a buffer, so that it
    is saved, copied and taken up like any other. It holds the bits of float64 numbers as int64,
    which a change of the module's type leaves alone. All draws are from `generator`.

    Shapes: candidates (population, dimension); losses (population,).

    Raises:
        MissingExtra: `cma` is not installed.
        ValueError: the population is below 4.

    Paper: Hansen, Ostermeier, 2001, Completely Derandomized Self-Adaptation in Evolution
    Strategies.

    >>> search = Evolution(3, step=0.5, population=8)
    >>> for _ in range(60):
    ...     candidates = search.ask()
    ...     search.tell((candidates - 1).square().sum(1))
    >>> bool((search.mean - 1).abs().max() < 0.1)
    True
    """

    state: Tensor

    def __init__(self, dimension: int, *, step: float, population: int,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(4, population=population, advice="try 20")
        self.dimension, self.step, self.population = dimension, step, population
        self.generator = generator
        self._asked: Any = None
        self.register_buffer("state", torch.empty(0, dtype=torch.int64))
        self._keep(self._made())

    @property
    def mean(self) -> Tensor:
        """The mean of what is drawn from."""
        return self.state.view(torch.float64)[_COUNTS:_COUNTS + self.dimension]

    def ask(self) -> Tensor:
        """Draw a population of candidates."""
        search = self._made()
        self._take_up(search)
        self._asked = search, search.ask()
        return torch.from_numpy(numpy.stack(self._asked[1])).to(self.state.device)

    def tell(self, losses: Tensor) -> None:
        """Move towards the candidates, asked for last, whose losses are low."""
        search, candidates = self._asked
        self._asked = None
        most = torch.finfo(torch.float32).max
        worst = torch.nan_to_num(losses.double(), nan=most, posinf=most)
        search.tell(candidates, worst.tolist())
        self._keep(search)

    def _made(self) -> Any:
        try:
            import cma
        except ImportError as error:
            raise MissingExtra("searching without gradients needs cma, which is not installed "
                               f"({error}); pip install 'netwright[blackbox]'") from error
        # No seed: it would be that of numpy's global state.
        return cma.CMAEvolutionStrategy(self.dimension * [0.0], self.step, {
            "popsize": self.population, "randn": self._normal, "seed": numpy.nan,
            "CMA_mirrors": 0, "verbose": -9})

    def _normal(self, *shape: int) -> numpy.ndarray:
        device = None if self.generator is None else self.generator.device
        return torch.randn(*shape, generator=self.generator, device=device,
                           dtype=torch.float64).cpu().numpy()

    def _keep(self, search: Any) -> None:
        """Put what `search` remembers into the buffer."""
        sampler, n = search.sm, self.dimension
        path = getattr(search.adapt_sigma, "ps", numpy.zeros(n))
        parts = [[search.sigma, search.countiter, search.countevals, sampler.last_update,
                  sampler.count_tell, sampler.count_eigen, search.itereigenupdated],
                 search.mean, search.pc, path, sampler.D, sampler.B.ravel(), sampler.C.ravel()]
        numbers = torch.from_numpy(numpy.concatenate([numpy.asarray(p, float) for p in parts]))
        self.state = numbers.view(torch.int64).to(self.state.device)

    def _take_up(self, search: Any) -> None:
        """Let `search` remember what is in the buffer."""
        from cma.utilities.utils import ElapsedWCTime

        n, numbers = self.dimension, self.state.cpu().view(torch.float64).numpy()
        step, *counts = numbers[:_COUNTS]
        generation, evaluations, updated, told, decomposed, at = map(int, counts)
        if not generation:
            return
        mean, path, step_path, roots, axes, covariance = numpy.split(
            numbers[_COUNTS:].copy(), numpy.cumsum([n, n, n, n, n * n]))
        search.sigma, search.countiter, search.countevals = float(step), generation, evaluations
        search.mean, search.mean_old, search.pc = mean, mean, path
        sampler = search.sm
        sampler.D, sampler.B, sampler.C = roots, axes.reshape(n, n), covariance.reshape(n, n)
        sampler.last_update, sampler.count_tell, sampler.count_eigen = updated, told, decomposed
        search.itereigenupdated = at
        search.adapt_sigma.initialize(search)
        search.adapt_sigma.ps = step_path
        search.adapt_sigma._ps_updated_iteration = generation
        search._updateBDfromSM(sampler)
        search.timer = ElapsedWCTime()  # a search that has begun has one
