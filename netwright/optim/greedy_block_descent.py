from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName

__all__ = ["GreedyBlockDescent"]

Select = Literal["random", "cyclic", "gauss_southwell", "gauss_southwell_lipschitz",
                 "gauss_southwell_diagonal", "gauss_southwell_quadratic"]
Update = Literal["gradient", "matrix", "newton"]
BOUNDED = ("gauss_southwell_diagonal", "gauss_southwell_quadratic")


@method(
    "optimizer",
    papers=["003-041"],
    search={
        "select": ["gauss_southwell_lipschitz", "gauss_southwell", "cyclic", "random"],
        "blocks": ["parameters", 5],
    },
    variants={"plain": {}, "random": {"select": "random"},
              "by parameter": {"blocks": "parameters", "select": "cyclic"},
              "Newton": {"update": "newton"}, "soft threshold": {"l1": 1e-3}},
)
class GreedyBlockDescent(Optimizer):
    """Step on the one block of coordinates that promises the most, as the rule reckons it.

    With g the gradient of all parameters as one vector x, g_b its block b, H a matrix that lies
    above the Hessian everywhere, L_b the largest eigenvalue of H_bb:

    select
    "random", "cyclic"             any block; each in turn
    "gauss_southwell"              argmax |g_b|
    "gauss_southwell_lipschitz"    argmax |g_b|² / L_b
    "gauss_southwell_diagonal"     argmax sum g_i² / H_ii
    "gauss_southwell_quadratic"    argmax g_b^T H_bb^-1 g_b, the most that can be promised

    update
    "gradient"                     x_b - g_b / L_b
    "matrix"                       x_b - H_bb^-1 g_b
    "newton"                       x_b - t (Hessian_bb + shift I)^-1 g_b, t halved from 1 until f
                                   falls by 1e-4 t of what its slope says; the shift is what makes
                                   the block positive definite

    The first falls f by |g_b|²/(2 L_b) at least, the second by g_b^T H_bb^-1 g_b / 2.

    `bound` is H, (n, n) for n coordinates in the order of the parameters. Without it, L_b starts
    from `lipschitz` and is doubled until the step keeps that promise; the rules with L_b then use
    what was found so far, and the two that need H are refused.

    `blocks` is the size of consecutive blocks, `"parameters"` for one of each parameter, or index
    tensors, which must hold every coordinate once. `variable` makes a new block at every step
    instead, of the `blocks` coordinates that come first by |g_i|, or by g_i² / H_ii with
    "gauss_southwell_diagonal".

    `l1` adds l1 |x|_1 to f, for the update "gradient", which then ends in a soft threshold; the
    rules take the length of that step (Gauss-Southwell), or what it promises (the Lipschitz
    rule), for their measure.

    `step(closure)` takes a function that returns the loss with its graph, without a call of
    `backward`: the optimizer differentiates it, as often as it needs. It returns the loss before
    the step. The last block is in `last_block`.

    Parameters without `requires_grad` have no coordinates; one that loses it later stays as it is.

    Args:
        params: what is minimised over.
        blocks: the size of a block, "parameters", or index tensors.
        select: which block is taken, see above.
        update: the step on it, see above.
        bound: H.
        lipschitz: what L_b starts from, where there is no H.
        variable: whether a block is made anew at every step.
        l1: what the sum of absolute values costs.
        generator: where random blocks are drawn; PyTorch's global state without one.

    Raises:
        ValueError: the options do not go together, or a size is wrong.
        UnknownName: `select` or `update` is none of those that are known.

    Paper: Nutini, Laradji, Schmidt, 2022, Let's Make Block Coordinate Descent Converge Faster:
    Faster Greedy Rules, Message-Passing, Active-Set Complexity, and Superlinear Convergence. Not
    here are its message passing for huge sparse blocks and its matrix updates under constraints.

    >>> A = torch.randn(30, 10)
    >>> x = Parameter(torch.ones(10))
    >>> optimizer = GreedyBlockDescent([x], blocks=2, bound=A.T @ A, update="matrix",
    ...                                select="gauss_southwell_quadratic")
    >>> losses = [float(optimizer.step(lambda: (A @ x).square().sum() / 2)) for _ in range(20)]
    >>> losses[-1] < losses[0] / 10
    True
    """

    differentiates = True  # `step` is given a function that returns the loss with its graph

    def __init__(self, params: Iterable[Parameter], *,
                 blocks: int | Literal["parameters"] | Sequence[Tensor] = 5,
                 select: Select = "gauss_southwell_lipschitz", update: Update = "gradient",
                 bound: Tensor | None = None, lipschitz: float = 1.0, variable: bool = False,
                 l1: float = 0.0, generator: Generator | None = None) -> None:
        for kind, name, names in (("block selection", select, Select), ("update", update, Update)):
            if name not in get_args(names):
                raise UnknownName(kind, str(name), get_args(names))
        super().__init__(params, {})
        if len(self.param_groups) > 1:
            raise ValueError(f"params must be one group, got {len(self.param_groups)}; blocks take "
                             "the place of groups")
        self.select, self.update, self.variable = select, update, variable
        self.l1, self.generator = l1, generator
        self._parameters: list[Tensor] = [p for p in self.param_groups[0]["params"]
                                          if p.requires_grad]
        if not self._parameters:
            raise ValueError("params must hold a parameter to step on, got none that requires "
                             "grad; set requires_grad on some")
        sizes = [p.numel() for p in self._parameters]
        self.bound = bound
        self._check(sum(sizes), lipschitz, blocks)
        self.blocks = _blocks(blocks, sizes, self._parameters[0].device)
        like = self._parameters[0]
        constants = torch.full((len(self.blocks),), lipschitz, dtype=like.dtype, device=like.device)
        self._owner = torch.empty(sum(sizes), dtype=torch.int64, device=like.device)
        for i, block in enumerate(self.blocks):
            self._owner[block] = i
        if bound is not None:
            self._inverse = torch.zeros_like(bound)
            for i, block in enumerate(self.blocks):
                part = bound[block][:, block]
                constants[i] = torch.linalg.eigvalsh(part)[-1]
                self._inverse[block[:, None], block] = torch.cholesky_inverse(
                    torch.linalg.cholesky(part))
        # In the group, so that a state_dict takes them along.
        self.param_groups[0] |= {"turn": 0, "lipschitz": constants}
        self.last_block = self.blocks[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Step on one block and return the loss before."""
        if closure is None:
            raise ValueError("closure must be a function that returns the loss, got None; the "
                             "optimizer differentiates it itself")
        with torch.enable_grad():
            f = closure()
            gradients = self._gradients(f, create_graph=self.update == "newton")
        g = torch.cat([part.detach().to_dense().reshape(-1) for part in gradients])
        x = torch.cat([p.reshape(-1) for p in self._parameters])
        f = f.detach()
        which, block = self._chosen(x, g)
        if self.update == "newton":
            self._newton(closure, f, x, block, gradients)
        elif self.update == "matrix":
            self._set(x, block, -self._preconditioned(g, which, block))
        else:
            self._gradient(closure, f, x, g, which, block)
        self.last_block = block
        self.param_groups[0]["turn"] += 1
        return f

    def _gradients(self, f: Tensor, *, retain_graph: bool | None = None,
                   create_graph: bool = False) -> list[Tensor]:
        """Return df/dp of each parameter, zeros where it has none."""
        learning = [p for p in self._parameters if p.requires_grad]
        found: Iterator[Tensor | None] = iter(torch.autograd.grad(
            f, learning, retain_graph=retain_graph, create_graph=create_graph,
            allow_unused=True) if learning and f.requires_grad else [None] * len(learning))
        every = [next(found) if p.requires_grad else None for p in self._parameters]
        return [torch.zeros_like(p) if g is None else g
                for p, g in zip(self._parameters, every, strict=True)]

    # Which block

    def _chosen(self, x: Tensor, g: Tensor) -> tuple[int, Tensor]:
        """Return the number of the block, -1 where it is made for this step, and its indices."""
        if self.variable:
            return -1, self._promised(x, g).topk(len(self.blocks[0])).indices.sort().values
        if self.select == "cyclic":
            which = self.param_groups[0]["turn"] % len(self.blocks)
        elif self.select == "random":
            which = int(torch.randint(len(self.blocks), (), generator=self.generator))
        else:
            scores = g.new_zeros(len(self.blocks)).index_add(0, self._owner, self._promised(x, g))
            which = int(scores.argmax())
        return which, self.blocks[which]

    def _promised(self, x: Tensor, g: Tensor) -> Tensor:
        """Return what each coordinate adds to the measure of its block."""
        L = self.param_groups[0]["lipschitz"][self._owner]
        if self.l1:
            d = self._shrunk(x, g, L)
            if self.select == "gauss_southwell":
                return d.square()
            return -(g * d + L / 2 * d * d + self.l1 * ((x + d).abs() - x.abs()))
        if self.select == "gauss_southwell":
            return g.square()
        if self.select == "gauss_southwell_lipschitz":
            return g.square() / L
        assert self.bound is not None
        if self.select == "gauss_southwell_diagonal":
            return g.square() / self.bound.diagonal()
        return g * (self._inverse @ g)

    def _preconditioned(self, g: Tensor, which: int, block: Tensor) -> Tensor:
        """Return H_bb^-1 g_b."""
        if which >= 0:
            return self._inverse[block[:, None], block] @ g[block]
        assert self.bound is not None
        return torch.linalg.solve(self.bound[block][:, block], g[block])

    # What step

    def _gradient(self, closure: Callable[[], Tensor], f: Tensor, x: Tensor, g: Tensor,
                  which: int, block: Tensor) -> None:
        constants = self.param_groups[0]["lipschitz"]
        if self.bound is not None:
            L = constants[which] if which >= 0 else torch.linalg.eigvalsh(
                self.bound[block][:, block])[-1]
            self._set(x, block, self._shrunk(x[block], g[block], L))
            return
        for _ in range(100):
            L = constants[which]
            d = self._shrunk(x[block], g[block], L)
            self._set(x, block, d)
            # Rounding of f must not make a step at the minimum look like a rise.
            allowed = 8 * torch.finfo(f.dtype).eps * f.abs()
            if closure().detach() <= f + g[block] @ d + L / 2 * d @ d + allowed:
                return
            constants[which] *= 2
        self._set(x, block, torch.zeros_like(d))
        raise ArithmeticError(f"the loss keeps no step of block {which}, however small; check that "
                              "it is smooth and finite, and gives the same when called again")

    def _shrunk(self, x: Tensor, g: Tensor, L: Tensor) -> Tensor:
        """Return the step of a block, with its soft threshold where there is one."""
        if not self.l1:
            return -g / L
        goal = x - g / L
        return goal.sign() * (goal.abs() - self.l1 / L).clamp_min(0) - x

    def _newton(self, closure: Callable[[], Tensor], f: Tensor, x: Tensor, block: Tensor,
                gradients: Sequence[Tensor]) -> None:
        H = x.new_zeros(len(block), len(block))
        with torch.enable_grad():
            flat = torch.cat([part.reshape(-1) for part in gradients])[block]
            for i in range(len(block) if flat.requires_grad else 0):  # not so where f is linear
                rows = self._gradients(flat[i], retain_graph=True)
                H[i] = torch.cat([part.reshape(-1) for part in rows])[block]
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        least = 1e-8 * values.abs().amax().clamp_min(1)
        values = values + (least - values[0]).clamp_min(0)
        g = flat.detach()
        d = -vectors @ ((vectors.T @ g) / values)
        slope, t = g @ d, 1.0
        allowed = 8 * torch.finfo(f.dtype).eps * f.abs()
        for _ in range(60):
            self._set(x, block, t * d)
            if closure().detach() <= f + 1e-4 * t * slope + allowed:
                return
            t /= 2
        self._set(x, block, torch.zeros_like(d))

    def _set(self, x: Tensor, block: Tensor, d: Tensor) -> None:
        """Make the parameters x with `d` added to the block."""
        moved = x.index_add(0, block, d)
        for p, part in zip(self._parameters, moved.split([p.numel() for p in self._parameters]),
                           strict=True):
            if p.requires_grad:
                p.copy_(part.view_as(p))

    def _check(self, n: int, lipschitz: float, blocks: object) -> None:
        if self.bound is not None and self.bound.shape != (n, n):
            raise ValueError(f"bound must be ({n}, {n}), a row for each coordinate of params, got "
                             f"{tuple(self.bound.shape)}")
        if self.bound is None and (self.select in BOUNDED or self.update == "matrix"
                                   or (self.variable and self.update == "gradient")):
            raise ValueError(f"bound must be given for select={self.select!r}, update="
                             f"{self.update!r}: give a matrix above the Hessian, or take "
                             "'gauss_southwell_lipschitz' with fixed blocks and 'gradient'")
        checks.above(0, lipschitz=lipschitz, advice="try 1")
        checks.at_least(0, l1=self.l1, advice="0 is none")
        if self.l1 and (self.update != "gradient" or self.select in BOUNDED or self.variable):
            raise ValueError("l1 must be 0 unless update='gradient' and blocks are fixed and "
                             "chosen by 'gauss_southwell', its Lipschitz kind, 'cyclic' or "
                             f"'random', got {self.l1}")
        if self.variable and (not isinstance(blocks, int) or self.select not in (
                "gauss_southwell", "gauss_southwell_diagonal")):
            raise ValueError("variable must be False unless blocks is a size and select is "
                             "'gauss_southwell' or 'gauss_southwell_diagonal'")


def _blocks(blocks: int | str | Sequence[Tensor], sizes: list[int],
            device: torch.device) -> list[Tensor]:
    """Return the coordinates of each block."""
    every = torch.arange(sum(sizes), device=device)
    if blocks == "parameters":
        return list(every.split(sizes))
    if isinstance(blocks, int):
        checks.between(1, len(every), whole=True, blocks=blocks,
                       advice=f"params have {len(every)} coordinates")
        return list(every.split(blocks))
    if isinstance(blocks, str):
        raise UnknownName("way to make blocks", blocks, ["parameters"])
    found = [block.to(device) for block in blocks]
    if not found or not torch.equal(torch.cat(found).sort().values, every):
        raise ValueError(f"blocks must hold each of the {len(every)} coordinates of params once")
    return found
