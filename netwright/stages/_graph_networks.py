"""Reads PyTorch Geometric's `BasicGNN`s: convolution, norm, activation and dropout are a stage."""

from typing import Any

from torch import Tensor, nn

from netwright.errors import CannotStage
from netwright.runtime.modes import rehearsing
from netwright.stages._bind import bound
from netwright.stages.stage import Context, Stage, Stages

_TRIMMED = ("num_sampled_nodes_per_hop", "num_sampled_edges_per_hop")


def is_graph_network(model: nn.Module) -> bool:
    """Whether `model` is a `BasicGNN` that runs `BasicGNN`'s own forward."""
    for base in type(model).__mro__:
        if (base.__module__ == "torch_geometric.nn.models.basic_gnn"
                and base.__name__ == "BasicGNN"):
            return type(model).forward is base.__dict__["forward"]
    return False


class GraphContext(Context):
    """What each layer returned, for models that join all layers' outputs at the end."""

    def __init__(self, x: Any, *, live: bool = False) -> None:
        super().__init__(x, live=live)
        self.outputs: dict[int, Any] = {}


class GraphStage(Stage):
    """Layers `layers` of a graph network."""

    def __init__(self, name: str, modules: list[nn.Module], model: Any, layers: range) -> None:
        super().__init__(name, modules)
        self.model, self.layers = model, layers

    def __call__(self, h: Any, context: GraphContext) -> Tensor:
        """Return the nodes' features after the stage's layers."""
        model = self.model
        given = bound(model, h if self.layers.start == 0 else context.x)
        trimmed = [name for name in _TRIMMED if given.get(name) is not None]
        if trimmed:
            raise CannotStage(f"{', '.join(trimmed)} cannot be staged, since they drop nodes "
                              "between layers; leave them out")
        h = given["x"] if self.layers.start == 0 else h
        for i in self.layers:
            h = self._layer(i, h, given)
            if hasattr(model, "jk") and i + 1 < model.num_layers:
                context.outputs[i] = context.keep(h)
        if self.layers.stop == model.num_layers:
            if hasattr(model, "jk"):
                h = model.jk([*self._earlier(context), h])
            if hasattr(model, "lin"):
                h = model.lin(h)
        return h

    def _layer(self, i: int, h: Any, given: dict[str, Any]) -> Tensor:
        model = self.model
        edges = {}
        if model.supports_edge_weight:
            edges["edge_weight"] = given.get("edge_weight")
        if model.supports_edge_attr:
            edges["edge_attr"] = given.get("edge_attr")
        h = model.convs[i](h, given["edge_index"], **edges)
        if i == model.num_layers - 1 and model.jk_mode is None:
            return h
        if model.act is not None and model.act_first:
            h = model.act(h)
        if model.supports_norm_batch:
            h = model.norms[i](h, given.get("batch"), given.get("batch_size"))
        else:
            h = model.norms[i](h)
        if model.act is not None and not model.act_first:
            h = model.act(h)
        return model.dropout(h)

    def _earlier(self, context: GraphContext) -> list[Tensor]:
        wanted = range(self.model.num_layers - 1)
        if any(i not in context.outputs for i in wanted):
            with rehearsing(self.model):
                h = bound(self.model, context.x)["x"]
                for i in wanted:
                    h = self._layer(i, h, bound(self.model, context.x))
                    context.outputs.setdefault(i, h)
        return [context.outputs[i] for i in wanted]


def graph_stages(model: Any, cuts: list[str] | None) -> Stages:
    """Return the chain of a `BasicGNN`: a stage for each convolution."""
    names = [f"convs.{i}" for i in range(model.num_layers)]
    starts = list(range(model.num_layers))
    if cuts is not None:
        if not set(cuts) <= set(names) or cuts != sorted(cuts, key=names.index):
            raise CannotStage(f"cuts={cuts!r} must name convolutions of "
                              f"{type(model).__name__} in their order; try cuts={names!r}")
        starts, names = [0, *(names.index(cut) for cut in cuts[1:])], cuts
    layers = [range(a, b) for a, b in zip(starts, [*starts[1:], model.num_layers], strict=True)]
    chain = []
    for name, group in zip(names, layers, strict=True):
        modules = [m for i in group for m in (model.convs[i], model.norms[i])]
        if isinstance(model.act, nn.Module):
            modules.append(model.act)
        modules.append(model.dropout)
        if group.stop == model.num_layers:
            modules += [getattr(model, name) for name in ("jk", "lin") if hasattr(model, name)]
        chain.append(GraphStage(name, modules, model, group))
    return Stages(model, chain, GraphContext)
