"""Graphs as inputs: their parts, and graphs with nodes and edges more."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_NAMES = ("x", "edge_index", "edge_weight")


class GraphParts(NamedTuple):
    """Features of the nodes, edges and, where they have any, weights of the edges."""

    features: Tensor
    edge_index: Tensor
    edge_weight: Tensor | None


def passes_messages(network: nn.Module) -> bool:
    """Whether `network` holds a message-passing layer of PyTorch Geometric.

    >>> passes_messages(nn.Linear(2, 3))
    False
    """
    return any(base.__name__ == "MessagePassing" and base.__module__.startswith("torch_geometric.")
               for module in network.modules() for base in type(module).__mro__)


def check_network(network: nn.Module) -> None:
    """Raise ValueError unless nodes and edges can be added to what `network` reads."""
    if not passes_messages(network):
        raise ValueError("network must be a graph network of PyTorch Geometric, got "
                         f"{type(network).__name__}, in which no layer passes messages along "
                         "edges; use MonoForward for other networks")
    cached = [name for name, module in network.named_modules() if getattr(module, "cached", False)]
    if cached:
        raise ValueError("network must read its edges anew each time, since virtual nodes are "
                         f"added to them, got cached=True in {', '.join(cached)}; set "
                         "cached=False")


def input_features(network: nn.Module, example: Any) -> int:
    """Return how many features a node has in the input of `network`."""
    if example is not None:
        return graph_parts(example).features.shape[1]
    found: Any = getattr(network, "in_channels", None)
    if not (isinstance(found, int) and found > 0):
        raise ValueError(f"example is needed, since the widths of {type(network).__name__} are not "
                         "known without a run; give a graph as example=")
    return found


def is_graph(x: Any) -> bool:
    """Whether `x` looks like (features, edge_index) or a mapping of these."""
    if isinstance(x, Mapping):
        return "edge_index" in x and isinstance(x.get("x"), Tensor)
    return (isinstance(x, (tuple, list)) and len(x) > 1 and all(isinstance(part, Tensor)
                                                                for part in x[:2])
            and x[1].ndim == 2 and len(x[1]) == 2 and not x[1].is_floating_point())


def graph_parts(x: Any) -> GraphParts:
    """Return the parts of `x`: (features, edge_index[, edge_weight]), or a mapping of these.

    Raises:
        ValueError: `x` is no such graph, or holds more.
    """
    if isinstance(x, Mapping):
        given = dict(x)
    elif isinstance(x, (tuple, list)):
        given = dict(zip((*_NAMES, *map(str, range(3, len(x)))), x, strict=False))
    else:
        given = {"x": x}
    features, edge_index, weight = (given.pop(name, None) for name in _NAMES)
    if not (isinstance(features, Tensor) and features.ndim == 2 and isinstance(edge_index, Tensor)
            and edge_index.layout == torch.strided and edge_index.ndim == 2
            and len(edge_index) == 2):
        got = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError("x must be a graph, (features, edge_index) of shapes (nodes, features) "
                         f"and (2, edges), or a mapping with x and edge_index, got {got}; use "
                         "MonoForward for other inputs")
    more = [name for name, value in given.items() if value is not None]
    if more:
        raise ValueError("x must hold no more than features, edge_index and edge_weight, since "
                         f"added nodes have nothing else, got {', '.join(more)} too; leave it out")
    return GraphParts(features, edge_index, weight)


def put_together(parts: GraphParts, x: Any) -> Any:
    """Return `parts` as an input of the kind of `x`."""
    values = parts[:2] if parts.edge_weight is None else parts
    return dict(zip(_NAMES, values, strict=False)) if isinstance(x, Mapping) else tuple(values)


def with_nodes(graph: GraphParts, features: Tensor, edges: Tensor) -> GraphParts:
    """Return `graph` with nodes behind its own, and with edges of weight 1."""
    weight = graph.edge_weight
    if weight is not None:
        weight = torch.cat([weight, weight.new_ones(edges.shape[1], *weight.shape[1:])])
    return GraphParts(torch.cat([graph.features, features.to(graph.features)]),
                      torch.cat([graph.edge_index, edges.to(graph.edge_index)], dim=1), weight)


def copied(graph: GraphParts, times: int) -> GraphParts:
    """Return `graph` so many times beside itself, as one graph of separate parts.

    >>> graph = GraphParts(torch.zeros(3, 2), torch.tensor([[0, 1], [1, 2]]), None)
    >>> copied(graph, 2).edge_index
    tensor([[0, 1, 3, 4],
            [1, 2, 4, 5]])
    """
    nodes, edges = len(graph.features), graph.edge_index
    shift = nodes * torch.arange(times, device=edges.device).repeat_interleave(edges.shape[1])
    weight = graph.edge_weight
    return GraphParts(graph.features.repeat(times, 1), edges.repeat(1, times) + shift,
                      None if weight is None else weight.repeat(times, *[1] * (weight.ndim - 1)))


def linked(graph: GraphParts, virtual: Tensor, labels: Tensor) -> GraphParts:
    """Return copies of `graph` whose nodes are tied, both ways, to the virtual node of their label.

    There are as many copies as `labels` has nodes for, each with virtual nodes of its own behind
    its nodes; a label below 0 ties a node to none.

    Shapes: virtual (classes, features); labels (copies * nodes,).
    """
    nodes, classes = len(graph.features), len(virtual)
    parts = []
    for one in labels.split(nodes):
        known = (one >= 0).nonzero().squeeze(1)
        there = torch.stack([known, nodes + one[known]])
        parts.append(with_nodes(graph, virtual, torch.cat([there, there.flip(0)], dim=1)))
    shifts = [k * (nodes + classes) for k in range(len(parts))]
    weights = [part.edge_weight for part in parts if part.edge_weight is not None]
    return GraphParts(torch.cat([part.features for part in parts]),
                      torch.cat([part.edge_index + shift for part, shift in
                                 zip(parts, shifts, strict=True)], dim=1),
                      torch.cat(weights) if weights else None)
