"""A network as a chain of stages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from netwright.errors import CannotStage


def call(model: nn.Module, x: Any) -> Tensor:
    """Return the output tensor of `model` for `x`: a tensor, a tuple or a mapping of arguments."""
    if isinstance(x, Tensor):
        output = model(x)
    elif isinstance(x, Mapping):
        output = model(**x)
    else:
        output = model(*x)
    return output if isinstance(output, Tensor) else _tensor(output)


def _tensor(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise CannotStage(f"the network returned {type(output).__name__}, which has no tensor called "
                      "logits; wrap it in a module whose forward returns one tensor")


class Stage:
    """One stage of a chain: `stage(h, context)` returns what the next stage takes."""

    def __init__(self, name: str, modules: list[nn.Module],
                 run: Callable[[Any, Any], Tensor]) -> None:
        self.name, self.modules, self._run = name, modules, run

    def __call__(self, h: Any, context: Any) -> Tensor:
        """Return what the next stage takes."""
        return self._run(h, context)

    def parameters(self) -> list[Parameter]:
        """Return the parameters that this stage uses, each once."""
        return list({id(p): p for m in self.modules for p in m.parameters()}.values())


class Stages:
    """A network as a chain of stages that share its parameters."""

    def __init__(self, model: nn.Module, chain: Sequence[Stage]) -> None:
        self.model, self._chain = model, list(chain)

    def __len__(self) -> int:
        return len(self._chain)

    def __getitem__(self, i: int) -> Stage:
        return self._chain[i]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._chain)

    @property
    def names(self) -> list[str]:
        """The stages' names, first to last."""
        return [stage.name for stage in self._chain]

    def parameters(self, i: int | None = None) -> list[Parameter]:
        """Return the parameters of stage `i`, or of the whole network."""
        return list(self.model.parameters()) if i is None else self[i].parameters()

    def context(self, x: Any) -> Any:
        """Return what later stages need besides the signal."""
        return None

    def __call__(self, x: Any) -> Tensor:
        """Return what the model returns for `x`."""
        context, h = self.context(x), x
        for stage in self:
            h = stage(h, context)
        return h


def stages(network: nn.Module | Stages, example: Any = None,
           cuts: Sequence[str] | None = None) -> Stages:
    """Read `network` as a chain of stages."""
    if isinstance(network, Stages):
        return network
    if not isinstance(network, nn.Sequential):
        raise CannotStage(f"{type(network).__name__} is not an nn.Sequential")
    groups: list[list[tuple[str, nn.Module]]] = []
    for name, module in network.named_children():
        weighted = any(p.ndim > 1 for p in module.parameters())
        if not groups or (weighted and any(p.ndim > 1 for _, m in groups[-1]
                                           for p in m.parameters())):
            groups.append([])
        groups[-1].append((name, module))
    chain = []
    for group in groups:
        part = nn.Sequential(*(module for _, module in group))
        chain.append(Stage(group[0][0], list(part), lambda h, context, part=part: part(h)))
    return Stages(network, chain)
