from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName
from netwright.rules.forward._activity import hidden, onward, squared
from netwright.rules.forward._blocks import in_blocks
from netwright.rules.forward._class_goodness import channels, compete, votes
from netwright.rules.forward._collaboration import Sum, added, sized, sums_of_all
from netwright.rules.forward._copies import SharedProducts
from netwright.rules.forward._graphs import (
    check_network,
    graph_parts,
    input_features,
    is_graph,
    linked,
    put_together,
)
from netwright.rules.forward._samples import (
    check_written,
    image_of,
    joined,
    normalised,
    one_hot,
    other_labels,
    overlaid,
    weights,
)
from netwright.rules.forward._softmax import softmax, trained_softmax
from netwright.rules.readout import Readout, count_classes, first_parameter, widths
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import Stages

__all__ = ["ForwardForward"]


@method(
    "rule",
    papers=["000-016", "001-031", "001-110", "003-024", "004-029"],
    saves=["backpropagation", "training memory"],
    needs=["classes", "a chain of stages"],
    search={"predict_by": ["softmax", None]},
    variants={"plain": {}, "mean goodness": {"goodness": "mean"},
              "softmax": {"predict_by": "softmax"}, "collaborating": {"collaborate": True},
              "after earlier layers": {"collaborate": "earlier"},
              "by class": {"goodness": "by_class"}, "one block": {"blocks": 1},
              "by class in a block": {"goodness": "by_class", "blocks": ["0"],
                                      "predict_by": "softmax"}},
)
class ForwardForward(Rule):
    """Train every stage to tell real samples from false ones by the size of its own activity.

    g(h) = sum_j h_j²;  p = sigmoid((g(h) - threshold) / temperature);
    L_i = -mean log p over positives and log(1 - p) over negatives;
    stage i descends L_i;  h_i / rms(h_i), cut off from its graph, goes on to stage i + 1.

    A positive sample carries its class as a one-hot label in its first `num_classes` numbers, a
    negative one another class (`negatives="label_overlay"`), or negatives are what
    `negatives(x, y)` returns. In a graph, (features, edge_index), the samples are its nodes: those
    that have a label carry it in their first features and learn, the others carry a neutral one.
    With `negatives="virtual_nodes"` a label is instead a pair of edges, to and from a node of the
    rule's own for the class (`virtual`), with random features; unlabelled nodes have none.
    Positives and negatives are two copies of the graph. Predictions are copies in each of which
    one in `tried` nodes carries a class and the others are neutral, as unlabelled nodes are in
    training: a stage that saw mostly neutral neighbours does not know others. With `hard_negatives`
    the other class is drawn in proportion to the network's own prediction, else all are as likely.

    The last stage, unless `classifier=False`, gives class scores and is not trained by goodness:
    it is a part of the softmax that the paper trains beside the layers. That softmax reads the
    normalised activity of all hidden stages but the first `skip`, for a neutral label (every
    class 1/classes; the positive sample itself where `negatives` is a function); the last stage
    reads the last hidden one, `readouts` the others. It learns by cross-entropy, and nothing
    of that reaches the hidden stages.

    `predict_by="goodness"` returns for each class the goodness of all hidden stages but the
    first `skip` with that label overlaid; `"softmax"` returns the softmax's logits, from one
    pass. With `predict_by="goodness"` and `hard_negatives=False` nothing reads the softmax, and
    it is not trained.

    No gradient passes from one stage to another, and a stage's activations are freed before the
    next stage runs. The returned loss is the mean of the L_i. Positives and negatives go through
    a stage as one batch, which is what its norms see, except where x is a tuple.

    With `collaborate` p counts the frozen goodness of the other hidden stages too: of all of them
    (True), or of the earlier ones (`"earlier"`), so that a stage learns what they leave open:
    p_i = sigmoid((g(h_i) + sum_{j != i} g(h_j) - threshold) / temperature), with nothing but g(h_i)
    differentiated. The stages change at once after a step, so all goodness is that of the weights
    before it. True finds it by one more forward pass, since to keep the activities instead would
    take memory in proportion to depth; `"earlier"` needs none.

    With `goodness="by_class"` no label is in x and there are no negative samples: a 1 x 1
    convolution M_i of the rule's own (`kernels`) reads one channel a class off each stage,
    g_c = mean over places of (M_i h_i)_c², L_i = -log softmax(g / temperature)_y, and predictions
    are the mean of the stages' g. So x may be what can carry no label: token ids, graphs. The paper
    normalises what goes on by its mean and deviation; here it is divided by its rms.

    With `blocks` consecutive hidden stages are one: g is that of the block's end, its gradient is
    exact inside of the block (but for what passes beside the signal, such as T5's position bias),
    and none crosses to another.

    Not in the paper: the input is divided by its rms too, as the author's published program does
    (`normalise_input`); the temperature is 1 there. Left out is peer normalisation, a pull on
    each unit's mean activity that keeps units from being always on or always off.

    Args:
        network: What is trained; it returns class scores, unless `classifier=False`.
        example: An input, where the stages or their widths cannot be known without one.
        num_classes: The number of classes; the last stage's width by default.
        goodness: `"sum"` or `"mean"` of squares, the unit of `threshold` and `temperature`; or
            `"by_class"`.
        threshold: The goodness that is as likely real as false; by default the number of
            features (1 where goodness is the mean), as in the author's program, of all stages
            that are counted.
        temperature: What the distance from the threshold is divided by; by default a tenth of
            the stage's number of features (0.1 where goodness is the mean, 1 by class).
        negatives: `"label_overlay"`, `"virtual_nodes"` for graphs, or a function of (x, y) that
            returns negative samples.
        amplitude: The value of a label's one.
        hard_negatives: Whether labels of negatives follow the network's own predictions.
        predict_by: `"goodness"` or `"softmax"`, all that there is where `negatives` is a function.
        skip: How many hidden stages, from the first, predictions leave out; one is always read.
            By default 1, and 0 with `collaborate` and by class.
        collaborate: Whether stages count the goodness of the others: True, False or `"earlier"`.
        blocks: How many blocks the hidden stages are joined into, or the names of those that begin
            one; by default each stage is by itself.
        classifier: Whether the last stage gives class scores; if not it is a hidden stage too.
        normalise_input: Whether the network's input is divided by its rms.
        max_rows: The most samples that a prediction by goodness runs at once.
        tried: In how many parts the nodes of a graph are tried with a label; 1 tries all at once,
            as fits a training in which all nodes had labels.
        generator: Where negative labels and the first `kernels` are drawn.

    Shapes: x (batch, *size), a mapping that holds `pixel_values`, a graph ((nodes, features),
    (2, edges)) with its edges' weights where it has any, or a mapping of x, edge_index and
    edge_weight, or with a function for `negatives` and by class whatever the network takes;
    y (batch,), with such a function also (batch, tokens) or None; h_i (batch, *size_i);
    M_i (classes, channels_i).

    Raises:
        ValueError: a label cannot be written into x, or an option does not fit the others.

    Paper: Hinton, 2022, The Forward-Forward Algorithm: Some Preliminary Investigations;
    `collaborate`: Lorberbom, Gat, Adi, Schwing, Hazan, 2023, Layer Collaboration in the
    Forward-Forward Algorithm; `"by_class"` and `blocks`: Krutsylo, 2025, Scalable Forward-Forward
    Algorithm; graphs: Park, Wang, Simoulin, Yang, Yang, Rossi, Trivedi, Ahmed, 2024, Forward
    Learning of Graph Neural Networks.

    >>> network = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
    ...                         nn.Linear(8, 3))
    >>> rule = ForwardForward(network)
    >>> rule(torch.randn(2, 20), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.predict(torch.randn(5, 20)).shape
    torch.Size([5, 3])
    """

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where each sample's negative label is drawn."""
        return self.by_class or callable(self.negatives)

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None,
                 goodness: Literal["sum", "mean", "by_class"] = "sum",
                 threshold: float | None = None, temperature: float | None = None,
                 negatives: Literal["label_overlay", "virtual_nodes"] | Callable[
                     [Any, Any], Any] = "label_overlay",
                 amplitude: float = 1.0, hard_negatives: bool = True,
                 predict_by: Literal["goodness", "softmax"] | None = None, skip: int | None = None,
                 collaborate: bool | Literal["earlier"] = False,
                 blocks: int | Sequence[str] | None = None, classifier: bool = True,
                 normalise_input: bool = True, max_rows: int = 4096, tried: int = 16,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.by_class = goodness == "by_class"
        self.overlays = not callable(negatives) and not self.by_class
        if predict_by is None:
            predict_by = "softmax" if callable(negatives) else "goodness"
        _check(goodness, negatives, predict_by, collaborate, threshold)
        checks.above(0, temperature=temperature, amplitude=amplitude, max_rows=max_rows,
                     optional=True)
        if skip is None:
            skip = 0 if self.by_class or collaborate else 1
        checks.count(0, skip=skip, advice="it is a number of hidden stages")
        checks.count(1, tried=tried, advice="it is a number of parts of a graph's nodes; try 16")

        self.links = negatives == "virtual_nodes"
        if self.links:
            check_network(self.network)
        self.stages = chain_of(self, network, example)
        depth = len(self.stages) - classifier
        if depth < 1:
            raise ValueError("network must have a hidden stage before its classifier, got one "
                             "stage; add a layer, or give classifier=False if it gives no scores")
        if blocks is not None:
            self.stages = in_blocks(self.stages, blocks, depth)
            depth = len(self.stages) - classifier
        sizes, channels_first = widths(self.stages, example)
        if not classifier and num_classes is None:
            raise ValueError("num_classes is needed with classifier=False, since no stage has one "
                             "output a class; give num_classes=")
        self.num_classes = count_classes(self.stages, num_classes,
                                         sizes[-1] if classifier else None)
        self.depth, self.first_read = depth, min(skip, depth - 1)
        self.goodness, self.threshold, self.temperature = goodness, threshold, temperature
        self.negatives, self.amplitude = negatives, amplitude
        self.hard_negatives = hard_negatives and self.overlays
        self.predict_by, self.classifier = predict_by, classifier
        self.collaborate = collaborate
        self.normalise_input, self.max_rows, self.tried = normalise_input, max_rows, tried
        self.softmax_is_read = self.hard_negatives or predict_by == "softmax"
        like = first_parameter(self.stages)
        read = range(self.first_read, depth - classifier) if self.softmax_is_read else ()
        self.readouts = nn.ModuleDict({
            str(i): Readout(self.stages.names[i], sizes[i], self.num_classes, zero=True,
                            channels_first=channels_first[i], like=like)
            for i in read})
        self.kernels = nn.ModuleList(
            Readout(self.stages.names[i], width, self.num_classes, like=like, generator=generator,
                    channels_first=channels_first[i])
            for i, width in enumerate(channels(self.stages, example, channels_first)[:depth])
            ) if self.by_class else None
        if self.links:
            width = input_features(self.network, example)
            drawn = torch.randn(self.num_classes, width, generator=generator,
                                device=None if generator is None else generator.device)
            self.register_buffer("virtual", (drawn / width ** 0.5).to(like))

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Add each stage's own gradient to `.grad`; return the mean of the stages' losses."""
        if self.by_class:
            return compete(self, self._input(x), y)
        if callable(self.negatives):
            passes = joined(x, self.negatives(x, y))
            if y is not None and self.softmax_is_read:
                check_labels(y, self.num_classes)
                trained_softmax(self, self._input(x), y)
            return self._contrast([self._input(part) for part in passes], y)
        if y is None:
            raise ValueError("y must hold the classes that are written into x, got None; "
                             "give negatives= to learn without labels")
        check_written(self._image(x), y, self.num_classes, some=is_graph(x))
        scores = trained_softmax(self, self._unlabelled(x), y) if self.softmax_is_read else None
        others = self._other_labels(y, scores if self.hard_negatives else None)
        shown = self._labelled(x, torch.cat([y, others]))
        if self.links:  # virtual nodes have no label
            y = torch.cat([y, y.new_full((self.num_classes,), -100)])
        return self._contrast([shown], y)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return each class's goodness, or the softmax's logits, in eval mode, without a graph."""
        with evaluating(self):
            if self.predict_by == "goodness":
                return votes(self, self._input(x)) if self.by_class else self._tried_labels(x)
            return softmax(self, self._unlabelled(x) if self.overlays else self._input(x))

    def _contrast(self, passes: list[Any], y: Tensor | None) -> Tensor:
        """Train the hidden stages on one pass of both halves, or on positives, then negatives."""
        hs, contexts = list(passes), [self.stages.context(x) for x in passes]
        sums: list[Sum] = [(0.0, 0.0)] * len(passes)
        if self.collaborate is True:
            with rehearsing(self.network):
                sums = sums_of_all(self, passes, contexts)
        losses = []
        for stage in list(self.stages)[:self.depth]:
            for k, (x, context) in enumerate(zip(passes, contexts, strict=True)):
                h = stage(hs[k], context)
                sign = torch.ones(len(h), device=h.device)
                sign[len(h) // 2 if len(passes) == 1 else (1 - k) * len(h):] = -1
                weight = weights(y, len(h), 3 - len(passes)).to(h.device) / len(passes)
                loss, hs[k], sums[k] = self._learn(h, x, sign, weight, sums[k])
                losses.append(loss)
        return torch.stack(losses).sum() / self.depth

    def _learn(self, h: Tensor, x: Any, sign: Tensor, weight: Tensor,
               shared: Sum) -> tuple[Tensor, Tensor, Sum]:
        """Add one stage's gradient; return its loss, what goes on, and the goodness shared so far.

        `shared` is the goodness of all stages, this one too, or of those before this one.
        """
        activity, square, features = squared(h, x)
        own = sized(self.goodness, square, features)
        if self.collaborate == "earlier":
            shared = added(shared, own)
        size, units = shared if self.collaborate else own
        threshold = units if self.threshold is None else self.threshold
        temperature = own[1] / 10 if self.temperature is None else self.temperature
        z = sign * (size - threshold) / temperature
        if h.requires_grad:  # a frozen stage has nothing to learn
            slope = -2 * weight * sign * torch.sigmoid(-z) / temperature
            if self.goodness == "mean":
                slope = slope / features
            h.backward((activity * slope.unsqueeze(1)).view_as(h).to(h.dtype))
        return (softplus(-z) * weight).sum(), onward(h, square, features), shared

    def _tried_labels(self, x: Any) -> Tensor:
        image = self._image(x)
        nodes, classes = len(image), torch.arange(self.num_classes, device=image.device)
        if not is_graph(x):
            found = [self._goodness_of(x, labels.repeat_interleave(nodes, 0)).view(-1, nodes)
                     for labels in classes.split(max(1, self.max_rows // nodes))]
            return torch.cat(found).T
        parts = min(self.tried, nodes)
        order = torch.randperm(nodes, generator=Generator().manual_seed(0)).to(image.device)
        part = torch.empty_like(order)
        part[order] = torch.arange(nodes, device=image.device) % parts
        tries = torch.cartesian_prod(torch.arange(parts, device=image.device), classes)
        found = [self._goodness_of(x, some[:, 1:].where(part == some[:, :1], -100).flatten())
                 .view(len(some), -1)[:, :nodes]
                 for some in tries.split(max(1, self.max_rows // nodes))]
        scores = torch.cat(found).view(parts, self.num_classes, nodes)
        return scores[part, :, torch.arange(nodes, device=image.device)]

    def _goodness_of(self, x: Any, labels: Tensor) -> Tensor:
        """Return the goodness of all hidden stages that are read, for copies with `labels`."""
        labelled = self._labelled(x, labels)
        with self._sharing(x, labelled):
            return self._goodness(labelled)

    def _sharing(self, x: Any, labelled: Any) -> AbstractContextManager[Any]:
        """Return what multiplies once what the copies of `x` have in common."""
        if is_graph(x) or self.links:
            return nullcontext()
        rows = self._image(labelled)
        return SharedProducts(rows.view(len(rows), -1), len(self._image(x)), self.num_classes)

    def _goodness(self, labelled: Any) -> Tensor:
        squares = [square for i, square, _ in hidden(self.stages, self.depth, labelled,
                                                     self.stages.context(labelled))
                   if i >= self.first_read]
        return torch.stack(squares).sum(0)

    def _other_labels(self, y: Tensor, scores: Tensor | None) -> Tensor:
        return other_labels(y, self.num_classes, scores, self.generator)

    def _labelled(self, x: Any, labels: Tensor) -> Any:
        """Return copies of `x` that carry `labels`, as many as there are labels for."""
        if not self.links:
            return self._overlaid(x, one_hot(labels, self.num_classes))
        return self._input(put_together(
            linked(graph_parts(x), self.get_buffer("virtual"), labels), x))

    def _unlabelled(self, x: Any) -> Any:
        """Return `x` with a neutral label, or with no virtual nodes."""
        neutral = torch.full((1, self.num_classes), 1 / self.num_classes)
        return self._input(x) if self.links else self._overlaid(x, neutral)

    def _overlaid(self, x: Any, labels: Tensor) -> Any:
        """Return copies of `x` that carry `labels`, as many as there are labels for, normalised."""
        return overlaid(x, self._image(x), labels, amplitude=self.amplitude,
                        normalise=self.normalise_input)

    def _image(self, x: Any) -> Tensor:
        """Return the tensor of `x` that labels are written into."""
        return image_of(x, self.num_classes)

    def _input(self, x: Any) -> Any:
        """Return a user's `x`, which carries no label, normalised."""
        return normalised(x) if self.normalise_input else x


def _check(goodness: str, negatives: Any, predict_by: str, collaborate: bool | str,
           threshold: float | None) -> None:
    if negatives not in ("label_overlay", "virtual_nodes") and not callable(negatives):
        raise UnknownName("way of making negatives", str(negatives),
                          ["label_overlay", "virtual_nodes"])
    checks.one_of(["sum", "mean", "by_class"], goodness=goodness)
    checks.one_of(["goodness", "softmax"], way_of_predicting=predict_by)
    if collaborate not in (True, False, "earlier"):
        raise UnknownName("way to collaborate", str(collaborate), ["True", "False", "earlier"])
    if goodness == "by_class":
        for name, value, usual in (("threshold", threshold, None),
                                   ("negatives", negatives, "label_overlay"),
                                   ("collaborate", collaborate, False)):
            if value != usual:
                raise ValueError(f"{name} must be left out where goodness='by_class', since "
                                 "there the classes of one sample compete with each other, "
                                 f"got {value}; give goodness='sum' for it")
    if predict_by == "goodness" and callable(negatives):
        raise ValueError("predict_by must be 'softmax' where negatives is a function, since "
                         "there is no label in x to compare goodness for, got 'goodness'")
