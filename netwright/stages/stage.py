from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter

from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import call

__all__ = ["Stage", "Stages", "call"]


class Context:
    """What the stages after the first need besides the signal, for one input.

    Where it is not `live`, what it keeps is cut off from the graph, so that each stage can be
    differentiated on its own and no graph outlives its stage.
    """

    def __init__(self, x: Any, *, live: bool = False) -> None:
        self.x, self.live = x, live

    def keep(self, value: Any) -> Any:
        """Return `value` as the context may hold it."""
        if self.live or not isinstance(value, Tensor):
            return value
        dual = forward_ad._current_level >= 0
        return value.detach() if value.requires_grad or dual else value


class Stage:
    """One stage of a chain: `stage(h, context)` returns what the next stage takes.

    `modules` are the modules whose parameters it uses, `loose` the parameters it uses that
    belong to none of them.
    """

    def __init__(self, name: str, modules: Iterable[nn.Module],
                 loose: Iterable[Parameter] = ()) -> None:
        self.name, self.modules, self.loose = name, list(modules), list(loose)

    def __call__(self, h: Any, context: Any) -> Tensor:
        """Return what the next stage takes."""
        raise TypeError(f"{type(self).__name__} must define __call__(h, context)")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def parameters(self) -> list[Parameter]:
        """Return the parameters that this stage uses, each once."""
        found = [p for module in self.modules for p in module.parameters()]
        return list({id(p): p for p in [*found, *self.loose]}.values())


class Stages:
    """A network as a chain of stages that share its parameters.

    h_0 = x;  h_{i+1} = stage_i(h_i, context);  h_n = model(x).

    `net(x)` equals `model(x)` bit for bit and draws the same random numbers, in train and eval
    mode. A stage may be run any number of times, on any signal of the shape it had.

    >>> import torch
    >>> from netwright.stages import stages
    >>> net = stages(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> net.names
    ['0', '2']
    >>> context = net.context(torch.randn(5, 4))
    >>> net[1](torch.randn(5, 8), context).shape
    torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, chain: Sequence[Stage],
                 make_context: Callable[..., Context] = Context) -> None:
        self.model, self._chain, self._make_context = model, list(chain), make_context

    def __len__(self) -> int:
        return len(self._chain)

    def __getitem__(self, i: int) -> Stage:
        return self._chain[i]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._chain)

    def __repr__(self) -> str:
        return f"Stages({type(self.model).__name__}: {', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """The stages' names, first to last."""
        return [stage.name for stage in self._chain]

    def parameters(self, i: int | None = None) -> list[Parameter]:
        """Return the parameters of stage `i`, or of the whole network."""
        return list(self.model.parameters()) if i is None else self[i].parameters()

    def context(self, x: Any, *, live: bool = False) -> Context:
        """Return what the stages need besides the signal when the network's input is `x`.

        It is filled when the first stage runs, or else when a later stage first asks for it.

        Where a parameter feeds something that passes beside the signal (T5's position bias), a
        `live` context carries its gradient and keeps the first stage's graph; any other holds
        the value alone, so that each stage may call `backward` by itself.
        """
        return self._make_context(x, live=live)

    def __call__(self, x: Any) -> Tensor:
        """Return what the model returns for `x`."""
        context, h = self.context(x, live=True), x
        for stage in self:
            h = stage(h, context)
        return h

    def table(self, example: Any = None) -> list[dict[str, Any]]:
        """Return a row for each stage: name, modules, parameters and, for an example, shape.

        >>> import torch
        >>> from netwright.stages import stages
        >>> net = stages(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> net.table(torch.randn(5, 4))[0]
        {'name': '0', 'modules': ['Linear', 'ReLU'], 'parameters': 40, 'shape': (5, 8)}
        """
        rows: list[dict[str, Any]] = []
        for stage in self:
            count = sum(0 if nn.parameter.is_lazy(p) else p.numel() for p in stage.parameters())
            rows.append({"name": stage.name, "modules": [type(m).__name__ for m in stage.modules],
                         "parameters": count, "shape": None})
        if example is not None:
            with evaluating(self.model), rehearsing(self.model):
                context, h = self.context(example), example
                for row, stage in zip(rows, self, strict=True):
                    h = stage(h, context)
                    row["shape"] = tuple(h.shape)
        return rows
