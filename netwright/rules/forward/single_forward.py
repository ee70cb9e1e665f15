import math
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from netwright import checks
from netwright.catalogue.facets import method
from netwright.models.gcn import gcn
from netwright.objectives.losses import cross_entropy
from netwright.rules.forward._graphs import (
    check_network,
    graph_parts,
    input_features,
    put_together,
    with_nodes,
)
from netwright.rules.readout import count_classes, first_parameter
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import Stages

__all__ = ["SingleForward"]


@method(
    "rule",
    papers=["000-016"],
    saves=["backpropagation", "training memory"],
    needs=["classes", "a graph"],
    variants={"plain": {}, "summed": {"predict_by": "sum"},
              "top-down": {"top_down": True, "predict_by": "sum"},
              "no classifier": {"classifier": False, "num_classes": 3},
              "lengths kept": {"normalise": False}},
    network=lambda: gcn(5, 3, dropout=0),
    batch=lambda: _ring(),
)
class SingleForward(Rule):
    """Train each layer of a graph network to bring nodes near a virtual node of their class.

    The graph gets a node v_c for each class c, with random features, and an edge to v_c from
    every labelled node of class c.
    h_i = stage_i(h_{i-1} / |h_{i-1}|), h_{i-1} cut off from its graph;
    G_i = h_i[nodes] h_i[v]^T / temperature;  L_i = cross_entropy(G_i, y);  stage i descends L_i.
    The last stage, unless `classifier=False`, gives class scores, and G_n = h_n[nodes].

    So there is one pass, and neither negative samples nor parameters besides the network's: a
    class looks as the layer's own message passing makes it look, from its labelled nodes. No
    gradient passes from one stage to another, and a stage's activations are freed before the
    next stage runs. The returned loss is the mean of the L_i.

    Edges lead to virtual nodes only, so that what a node gets does not depend on any label, and
    unlabelled graphs, also new ones, are predicted. The paper's experiments have edges back to the
    labelled nodes too, which need the labels for predictions as well, on the same graph.

    `predict_by="last"` gives the last stage's scores; `"sum"` the logarithm of the mean of all
    stages' class probabilities, where h_i[v] are those that the last step in training saw
    (`prototype_i`, with what dropout left of them).

    With `top_down` stage i compares the mean of its own output and the normalised outputs of all
    hidden stages above it, of the weights before the step: a stage learns what those above leave
    open. They are found by one more forward pass; the paper keeps what they were at the previous
    step instead, which takes memory in proportion to depth. Its other way, where a layer reads
    the output of the one above beside that below, needs layers of other widths.

    Rows are divided by their length as in the paper. `normalise=False` leaves that out; then
    `predict_by="last"` gives what the network itself does, and the rule can be thrown away.

    Args:
        network: A graph network of PyTorch Geometric, without cached convolutions.
        example: A graph; needed where the network is no `BasicGNN` or has lazy layers.
        num_classes: The number of classes; the last stage's width by default.
        predict_by: `"last"` or `"sum"`, all that there is with `classifier=False`.
        top_down: Whether hidden stages learn beside the outputs of those above.
        classifier: Whether the last stage gives class scores; if not it is a hidden stage too.
        normalise: Whether each stage's input is divided by its length, node by node.
        temperature: What the products of nodes and virtual nodes are divided by.
        generator: Where the virtual nodes' features are drawn, N(0, 1 / features).

    Shapes: x ((nodes, features), (2, edges)), or with a third tensor, the edges' weights, or a
    mapping of x, edge_index and edge_weight; y (nodes,), -100 for nodes without a label;
    h_i (nodes + classes, width_i).

    Raises:
        ValueError: the network is no graph network, or one whose convolutions are cached; x is
            not a graph; no node has a label; an option does not fit the network.

    Paper: Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed, 2024, Forward Learning of Graph
    Neural Networks.

    >>> from netwright.data import karate
    >>> from netwright.models import gcn
    >>> rule = SingleForward(gcn(34, 2))
    >>> ((x, y),) = karate().batches("train")
    >>> rule(x, y).requires_grad
    False
    >>> rule.predict(x).shape, rule.prototype_0.shape
    (torch.Size([34, 2]), torch.Size([2, 16]))
    """

    remembers = True  # the prototypes that predictions need

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, predict_by: Literal["last", "sum"] | None = None,
                 top_down: bool = False, classifier: bool = True, normalise: bool = True,
                 temperature: float = 1.0, generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        check_network(self.network)
        if predict_by is None:
            predict_by = "last" if classifier else "sum"
        checks.one_of(["last", "sum"], way_of_predicting=predict_by)
        if predict_by == "last" and not classifier:
            raise ValueError("predict_by must be 'sum' with classifier=False, since no stage gives "
                             "class scores then, got 'last'")
        checks.above(0, temperature=temperature)
        self.stages = chain_of(self, network, example)
        features, *sizes = _widths(self.stages, example)
        self.depth = len(sizes) - classifier
        hidden = sizes[:self.depth]
        if not classifier and num_classes is None:
            raise ValueError("num_classes is needed with classifier=False, since no stage has one "
                             "output a class; give num_classes=")
        self.num_classes = count_classes(self.stages, num_classes,
                                         sizes[-1] if classifier else None)
        if top_down and len(set(hidden)) > 1:
            raise ValueError("top_down=True needs hidden stages of one width, whose mean can be "
                             f"taken, got {hidden}; make them equal, or leave top_down out")
        self.predict_by, self.top_down, self.classifier = predict_by, top_down, classifier
        self.normalise, self.temperature = normalise, temperature
        like = first_parameter(self.stages)
        drawn = torch.randn(self.num_classes, features, generator=generator,
                            device=None if generator is None else generator.device)
        self.register_buffer("virtual", (drawn / features ** 0.5).to(like))
        for i, width in enumerate(hidden):
            self.register_buffer(f"prototype_{i}",
                                 torch.zeros(self.num_classes, width).to(like))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each stage's own gradient to `.grad`; return the mean of the stages' losses."""
        graph = graph_parts(x)
        nodes = len(graph.features)
        known = self._labelled(y, nodes)
        edges = torch.stack([known, nodes + y[known]])
        graph = with_nodes(graph, self.get_buffer("virtual"), edges)
        if self.normalise:  # in place, since the features of a graph can take most of the memory
            normalize(graph.features, dim=1, out=graph.features)
        x = put_together(graph, x)
        y = y[known]
        above = self._sum_of_outputs(x) if self.top_down else None
        h, context, losses, classes = x, self.stages.context(x), [], []
        for i, stage in enumerate(self.stages):
            h = stage(h, context)
            if i < self.depth:
                own, above = self._beside(i, h, above)
                classes.append(own[nodes:].detach().clone())  # a view would keep all nodes
                scores = own[known] @ own[nodes:].T / self.temperature
            else:
                scores = h[known]
            loss = cross_entropy(scores, y)
            if loss.requires_grad:  # not so in a stage that is frozen
                loss.backward()
            losses.append(loss.detach())
            h = self._onward(h.detach())
        present = torch.unique(y)
        for i, seen in enumerate(classes):
            prototype = self.get_buffer(f"prototype_{i}")
            prototype[present] = seen[present].to(prototype)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the last stage's scores, or log p of all stages, in eval mode, without a graph."""
        with evaluating(self):
            graph = graph_parts(x)
            x = put_together(graph._replace(features=self._onward(graph.features)), x)
            read = self.predict_by == "sum"
            above = self._sum_of_outputs(x) if self.top_down and read else None
            h, context, votes = x, self.stages.context(x), []
            for i, stage in enumerate(self.stages):
                h = stage(h, context)
                if read and i < self.depth:
                    own, above = self._beside(i, h, above)
                    votes.append(own @ self.get_buffer(f"prototype_{i}").to(own).T
                                 / self.temperature)
                elif i == self.depth:
                    votes.append(h)
                h = self._onward(h)
        if not read:
            return votes[-1]
        total = torch.stack([vote.log_softmax(1) for vote in votes]).logsumexp(0)
        return total - math.log(len(votes))

    def _labelled(self, y: Tensor, nodes: int) -> Tensor:
        """Return the nodes that have a label, which must be one of the classes."""
        if y.shape != (nodes,):
            raise ValueError(f"y must have one label a node, ({nodes},), and -100 for nodes "
                             f"without, got {tuple(y.shape)}")
        check_labels(y, self.num_classes)
        known = (y >= 0).nonzero().squeeze(1)
        if not len(known):
            raise ValueError("y must label at least one node, got -100 alone; leave such batches "
                             "out")
        return known

    def _onward(self, h: Tensor) -> Tensor:
        return normalize(h, dim=1) if self.normalise else h

    def _sum_of_outputs(self, x: Any) -> Tensor | float:
        """Return the sum of what all hidden stages hand on; draw as the pass that learns will."""
        h, total = x, torch.zeros(())
        with rehearsing(self.network):
            context = self.stages.context(x)
            for stage in list(self.stages)[:self.depth]:
                h = self._onward(stage(h, context))
                total = h + total.to(h)
        return total

    def _beside(self, i: int, h: Tensor, above: Tensor | float | None,
                ) -> tuple[Tensor, Tensor | float | None]:
        """Return the output of hidden stage `i` as it is compared, and the sum of those above."""
        if above is None:
            return h, None
        above = above - self._onward(h.detach())
        return (h + above) / (self.depth - i), above


def _widths(net: Stages, example: Any) -> list[int]:
    """Return the number of features of the input and of each stage's output."""
    model: Any = net.model
    features = input_features(model, example)
    if example is None:
        return [features, *[int(model.hidden_channels)] * (len(net) - 1), int(model.out_channels)]
    shapes = [row["shape"] for row in net.table(example)]
    bad = [(name, shape) for name, shape in zip(net.names, shapes, strict=True) if len(shape) != 2]
    if bad:
        raise ValueError("each stage of network must give (nodes, features), got "
                         f"{bad[0][1]} from stage {bad[0][0]}; leave pooling out")
    return [features, *(shape[1] for shape in shapes)]


def _ring() -> tuple[tuple[Tensor, Tensor], Tensor]:
    nodes = torch.arange(12)
    edges = torch.stack([nodes, nodes.roll(1)])
    features = torch.randn(12, 5, generator=Generator().manual_seed(7))
    return (features, edges), torch.where(nodes % 4 == 0, -100, nodes % 3)
