from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, one_hot, softplus
from torch.nn.parameter import is_lazy

from netwright import checks
from netwright.catalogue.facets import method
from netwright.rules.forward._samples import check_written, image_of, overlaid
from netwright.rules.readout import first_parameter
from netwright.rules.rule import Rule, chain_of
from netwright.runtime.modes import evaluating, rehearsing
from netwright.stages import Stages
from netwright.stages._sequential import SequentialStage

__all__ = ["PhysicalForwardForward"]


@method(
    "rule",
    papers=["000-034"],
    saves=["backpropagation", "derivatives"],
    needs=["classes", "a chain of stages"],
    search={"sharpness": (3.0, 100.0)},
)
class PhysicalForwardForward(Rule):
    """Train the layers around opaque ones, through which nothing can be differentiated.

    a_i = layer_i(h);  h = opaque_i(a_i), without a graph;
    g_i = cos(a_i, v_i), v_i a fixed random direction;
    L_i = mean log(1 + exp(-sharpness (g_i(positive) - g_i(negative))));  layer i descends L_i.

    What has no parameters is opaque: a measured system, a function of NumPy, or a plain
    activation. It gets a tensor that needs no gradient, under `torch.no_grad`, and may be noisy
    and drift, since nobody models it. Its modules between two layers run as they stand.

    A positive sample carries its own class as a one-hot label in its first `num_classes`
    numbers, a negative one another class, drawn evenly; both go through the layers as one batch.
    No gradient passes from one layer to another, and the returned loss is the mean of the L_i.

    Predictions are for each class the sum of all layers' g with that class as the label: every
    layer votes, also the last, whose outputs are not read as class scores.

    In the paper's programs the length of a_i is taken of its absolute values first, as waves are
    measured; here an opaque module can do that. Their opaque systems hand on their own input too:
    return both from the module, joined.

    Args:
        network: An `nn.Sequential`; see above for what is opaque in it.
        example: An input, needed where a layer that is not linear ends before an opaque one.
        num_classes: The number of classes; the last layer's width by default.
        sharpness: How steep the loss is in the difference of g.
        amplitude: The value of a label's one.
        max_rows: The most samples that a prediction runs at once.
        generator: Where the directions and the negative labels are drawn.

    Shapes: x (batch, *size); y (batch,); a_i (batch, *size_i); v_i (prod(size_i),).

    Raises:
        ValueError: the network is no `nn.Sequential`; a label cannot be written into x; an
            option is out of range.

    Paper: Momeni, Rahmani, Malléjac, del Hougne, Fleury, 2023, Backpropagation-free Training of
    Deep Physical Neural Networks (the loss is that of its published programs).

    >>> class Measured(nn.Module):
    ...     def forward(self, h):
    ...         return torch.from_numpy(abs(h.numpy()))  # no gradient could come back
    >>> rule = PhysicalForwardForward(nn.Sequential(nn.Linear(20, 8), Measured(), nn.Linear(8, 3)))
    >>> rule(torch.randn(2, 20), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.predict(torch.randn(5, 20)).shape
    torch.Size([5, 3])
    """

    same_in_shares = False  # each sample's negative label is drawn

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, sharpness: float = 4.0, amplitude: float = 1.0,
                 max_rows: int = 4096, generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.above(0, sharpness=sharpness, amplitude=amplitude, max_rows=max_rows)
        net = chain_of(self, network, example)
        self._runs = _runs(net)
        sizes = _widths(self._runs, example)
        self.num_classes = sizes[-1] if num_classes is None else num_classes
        checks.count(2, num_classes=self.num_classes, advice="give the number of classes")
        self.sharpness, self.amplitude, self.max_rows = sharpness, amplitude, max_rows
        like = first_parameter(net)
        for i, width in enumerate(sizes):
            drawn = torch.randn(width, generator=generator,
                                device=None if generator is None else generator.device)
            self.register_buffer(f"direction_{i}", (drawn / drawn.norm()).to(like))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each layer's own gradient to `.grad`; return the mean of the layers' losses."""
        image, rows = image_of(x, self.num_classes), len(y)
        check_written(image, y, self.num_classes)
        labels = one_hot(torch.cat([y, self._other_labels(y)]), self.num_classes)
        losses: list[Tensor] = []
        h = self._overlaid(image, labels)
        for run in self._runs:
            if not run.learns:
                with torch.no_grad():
                    h = run(h)
                continue
            a = run(h)
            g = self._goodness(len(losses), a)
            loss = softplus(self.sharpness * (g[rows:] - g[:rows])).mean()
            if loss.requires_grad:  # not so in a layer that is frozen
                loss.backward()
            losses.append(loss.detach())
            h = a.detach()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return each class's goodness, in eval mode, without a graph."""
        image, found = image_of(x, self.num_classes), []
        with evaluating(self):
            for labels in torch.eye(self.num_classes).split(max(1, self.max_rows // len(image))):
                h = self._overlaid(image, labels.repeat_interleave(len(image), 0))
                votes: list[Tensor] = []
                for run in self._runs:
                    h = run(h)
                    if run.learns:
                        votes.append(self._goodness(len(votes), h))
                found.append(torch.stack(votes).sum(0).view(len(labels), len(image)).T)
        return torch.cat(found, 1)

    def _goodness(self, i: int, a: Tensor) -> Tensor:
        a = a.flatten(1)
        if a.dtype in (torch.float16, torch.bfloat16):
            a = a.float()
        return cosine_similarity(a, self.get_buffer(f"direction_{i}").to(a), dim=1)

    def _overlaid(self, image: Tensor, labels: Tensor) -> Tensor:
        labelled: Tensor = overlaid(image, image, labels, amplitude=self.amplitude,
                                    normalise=False)
        return labelled

    def _other_labels(self, y: Tensor) -> Tensor:
        device = y.device if self.generator is None else self.generator.device
        shift = torch.randint(1, self.num_classes, y.shape, generator=self.generator,
                              device=device)
        return (y + shift.to(y.device)) % self.num_classes


class _Run(NamedTuple):
    """Modules of one stage that run one after another, all with parameters or all without."""

    modules: list[nn.Module]
    learns: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Return what the next run takes."""
        for module in self.modules:
            h = module(h)
        return h


def _runs(net: Stages) -> list[_Run]:
    """Return the modules of `net`, in runs of layers and of opaque modules in turn."""
    if not all(isinstance(stage, SequentialStage) for stage in net):
        raise ValueError("network must be an nn.Sequential, so that it can be told what runs "
                         f"between its layers, got {type(net.model).__name__}; put its parts into "
                         "one, or use ForwardForward if it can be differentiated")
    runs: list[_Run] = []
    for stage in net:
        for k, module in enumerate(stage.modules):
            learns = any(True for _ in module.parameters())
            if k == 0 or runs[-1].learns != learns:
                runs.append(_Run([], learns))
            runs[-1].modules.append(module)
    return runs


def _widths(runs: list[_Run], example: Any) -> list[int]:
    """Return how many numbers each layer gives for a sample, by an example where need be."""
    ends = [run.modules[-1] for run in runs if run.learns]
    if all(isinstance(end, nn.Linear) and not is_lazy(end.weight) for end in ends):
        return [end.out_features for end in ends if isinstance(end, nn.Linear)]
    if example is None:
        raise ValueError("example is needed, since the widths of layers that are not linear are "
                         "not known without a run; give an input as example=")
    sizes: list[int] = []
    network = nn.ModuleList(module for run in runs for module in run.modules)
    with evaluating(network), rehearsing(network):
        h = example
        for run in runs:
            h = run(h)
            if run.learns:
                sizes.append(h[0].numel())
    return sizes
