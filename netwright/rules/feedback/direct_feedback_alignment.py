from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.feedback.matrices import (
    Matrices,
    accumulate,
    counted_apart,
    draw,
    matrices_of,
    size_of,
)
from netwright.rules.readout import without_padding
from netwright.rules.rule import Rule, chain_of, check_labels, targets
from netwright.runtime.modes import evaluating
from netwright.stages import Stages

__all__ = ["DirectFeedbackAlignment"]


@method(
    "rule",
    papers=["001-137", "002-102", "003-212"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
    variants={"plain": {}, "shared": {"share": True},
              "sign-symmetric": {"feedback": "sign_symmetric"},
              "learned": {"feedback": "kolen_pollack"},
              "ternary and noisy": {"ternary": 0.4, "noise": 0.1}},
)
class DirectFeedbackAlignment(Rule):
    """Train every stage with a random projection of the output error of its own.

    e = dL/dlogits;  dL/dh_i := e B_i in hidden stages, e in the last;  B_i ~ N(0, s^2), fixed;
    s^2 = min(mean(W_last^2), 1/classes).
    share: B_i = the first prod(size_i) columns of one B, drawn likewise.
    sign_symmetric: B_i = |B_i| sign(W_last ... W_(i+1)), where those are all linear layers.
    kolen_pollack: dL/dB_i := e^T h_i, the update that W_last would have if it read h_i.

    Within a stage the derivatives are exact; between stages nothing flows. Where the leading axes
    of h_i are those of the logits (tokens, nodes), each of their positions receives the
    projection of its own error, and padding (an `attention_mask` of 0) none; else all of a
    sample's error is projected to all of its h_i. An h_i with shorter axes than the example's takes
    the part of B_i that it has.

    How B is drawn is a choice of this rule, made so that a stage receives an error of the size that
    the last one hands down, whatever the network was initialised with: W_last is the last matrix
    of weights in the last stage, and s^2 = 1/classes where it is all zeros. The error does not fade
    from stage to stage, so that in a deep network whose gradients do, the first stages learn faster
    than by backpropagation. `sign_symmetric`, which these papers do not have, is what Liao, Leibo
    and Poggio do in feedback alignment.

    `ternary` and `noise` simulate an optical projector between the output and the hidden stages.
    `ternary` is a threshold for the error n e of one label, where the loss is a mean over n:
    sign(e)/n is projected where |n e| > ternary, and 0 elsewhere. `noise` adds normal numbers to
    each projection, of `noise` times its root mean square, drawn anew at each call; an error of 0
    is not sent, and gets none. With `share` the device projects once, and each stage reads its
    columns, noise and all. The last stage, and the update of a learned B, keep the exact e. That
    noise grows with the signal is a choice of this rule. An undecided network's error is 1/classes
    for each wrong class, so a `ternary` below that sends ones for all of them, and does not train.

    With `kolen_pollack`, where the last stage is one linear layer, B of the last hidden stage takes
    all that the call adds to `W_last.grad`, that of an embedding which shares it among it. So
    W_last - B shrinks by the optimizer's weight decay and by nothing else: give the optimizer one
    that is decoupled (SGD's, AdamW's).

    Args:
        feedback: "random", "sign_symmetric" or "kolen_pollack".
        share: whether all stages read parts of one random matrix.
        ternary: the threshold of a projector's three-valued error; None sends the error as it is.
        noise: of a projector, over the root mean square of what it returns.

    Shapes: logits (*lead, classes); h_i (*lead, *size_i); e as logits;
    B_i (classes, *size_i), or (prod(logits[0]), *size_i) where only the batch axis is shared.

    Raises:
        ValueError: no example; logits without a class axis; a stage that does not keep the batch
            axis; `sign_symmetric` where a stage is not one linear layer; `share` with feedback
            that is not random; `ternary` or `noise` below 0.

    Papers: Nøkland, 2016, Direct Feedback Alignment Provides Learning in Deep Neural Networks.
    Launay, Poli, Boniface, Krzakala, 2020, Direct Feedback Alignment Scales to Modern Deep
    Learning Tasks and Architectures. Launay, Poli, Müller, Pariente, Carron, Daudet, Krzakala,
    Gigan, 2020, Hardware Beyond Backpropagation: a Photonic Co-Processor for Direct Feedback
    Alignment. Webster, Choi, Ahn, 2020, Learning the Connections in Direct Feedback Alignment.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = DirectFeedbackAlignment(network, example=torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).shape
    torch.Size([])
    >>> rule.feedback["0"].shape
    torch.Size([3, 8])
    """

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where noise is drawn for each sample."""
        return not self.noise

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 feedback: Literal["random", "sign_symmetric", "kolen_pollack"] = "random",
                 share: bool = False, ternary: float | None = None, noise: float = 0.0,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(["random", "sign_symmetric", "kolen_pollack"], feedback=feedback)
        if share and feedback != "random":
            raise ValueError(f"share=True keeps one fixed matrix, got feedback={feedback!r}; "
                             "use share=False")
        if ternary is not None and not ternary >= 0:
            raise ValueError("ternary must be a threshold of at least 0 for one label's error, or "
                             f"None for exact errors, got {ternary}; try 0.2")
        checks.at_least(0, noise=noise,
                        advice="it is a share of each projection's root mean square; try 0.1")
        if example is None:
            raise ValueError("example must be an input of the network, got None; the feedback "
                             "matrices take their sizes from it")
        self.stages, self.loss, self.share = chain_of(self, network, example, loss), loss, share
        self.ternary, self.noise = ternary, noise
        self.feedback = Matrices(learned=feedback == "kolen_pollack")
        with evaluating(self.network), torch.no_grad():
            *hidden, logits = self._outputs(example)
        if logits.ndim < 2:
            raise ValueError("network must return (batch, classes) or (batch, *, classes), got "
                             f"{tuple(logits.shape)}; keep the batch axis and a class axis")
        self._draw(hidden, logits)
        self._last = self._last_layer() if self.feedback.learned else []
        self._linears = self._linears_after_first() if feedback == "sign_symmetric" else []

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the update of direct feedback alignment to `.grad`; return the detached loss."""
        below = self.stages[len(self.stages) - 2].parameters()
        # a frozen stage reads no feedback, and its B stays with it
        weights = [layer.weight for layer in self._last if any(p.requires_grad for p in below)]
        with counted_apart(weights):
            loss = self._update(x, y)
            for weight in weights:
                if weight.grad is not None:
                    accumulate(self.feedback[self._hidden[-1].name], weight.grad)
        return loss

    def _update(self, x: Any, y: Tensor) -> Tensor:
        outputs = self._outputs(x)
        logits = outputs.pop()
        output = logits.detach().requires_grad_()
        if self.loss is cross_entropy:
            check_labels(y, output.shape[-1])
        loss = self.loss(output, y)
        (error,) = torch.autograd.grad(loss, output)
        for hidden, h in zip(self._hidden, outputs, strict=True):
            hidden.check(h, error)
        products = self._products()
        projected: dict[int, Tensor] = {}
        sent = error if self.ternary is None else _ternary(error, self.ternary,
                                                           targets(output, y))
        if logits.requires_grad:  # a frozen stage has nothing to learn
            logits.backward(error)
        for name, lead, rows, size in reversed(self._hidden):
            h = outputs.pop()  # what stage i stored for its backward pass is freed before i - 1
            if not h.requires_grad:
                continue
            flat = sent.flatten(0, lead - 1).flatten(1)
            if self.share:
                if lead not in projected:
                    projected[lead] = self._project(flat, self.feedback[str(rows)])
                signal = projected[lead][:, :h.shape[lead:].numel()]
            else:
                B = self.feedback[name]
                if B.requires_grad and not (self._last and name == self._hidden[-1].name):
                    exact = error.flatten(0, lead - 1).flatten(1)
                    read = without_padding(x, h.detach()).flatten(0, lead - 1).flatten(1)
                    update = exact.T @ read.to(exact.dtype)
                    _accumulate(B, update.view(rows, *h.shape[lead:]))
                B = B.detach()[_part(h.shape[lead:], size)].flatten(1)
                if products:
                    B = B.copysign(products[name])
                signal = self._project(flat, B)
            h.backward(without_padding(x, signal.view(h.shape).to(h.dtype)))
        return loss.detach()

    def _project(self, errors: Tensor, B: Tensor) -> Tensor:
        """Return `errors` B, with the noise of the projector."""
        signal = errors @ B.to(errors.dtype)
        if self.noise:
            device = signal.device if self.generator is None else self.generator.device
            drawn = torch.randn(signal.shape, generator=self.generator, device=device)
            rms = signal.square().mean(1, keepdim=True).sqrt()
            signal = signal + self.noise * rms * drawn.to(signal)
        return signal

    def _outputs(self, x: Any) -> list[Tensor]:
        context, h, outputs = self.stages.context(x), x, []
        for stage in self.stages:
            outputs.append(stage(h, context))
            h = outputs[-1].detach()
        return outputs

    def _draw(self, hidden: list[Tensor], logits: Tensor) -> None:
        weights, widths = matrices_of(list(self.stages)[-1]), dict[int, int]()
        deviation = size_of(weights[-1] if weights else logits[:0], logits.shape[-1] ** -0.5)
        self._hidden: list[_Hidden] = []
        for name, h in zip(self.stages.names, hidden, strict=False):
            together = h.shape[:logits.ndim - 1] == logits.shape[:-1]
            lead = logits.ndim - 1 if together else 1
            if h.shape[:lead] != logits.shape[:lead]:
                raise ValueError(
                    f"stage {name!r} must keep the batch axis of the logits "
                    f"{tuple(logits.shape)}, got {tuple(h.shape)}; cut the stages elsewhere, or "
                    "use FeedbackAlignment")
            size, rows = h.shape[lead:], logits.shape[lead:].numel()
            self._hidden.append(_Hidden(name, lead, rows, size))
            widths[rows] = max(widths.get(rows, 0), size.numel())
            if not self.share:
                self.feedback.add(name, draw((rows, *size), deviation, logits, self.generator))
        if self.share:
            for rows, width in widths.items():
                self.feedback.add(str(rows), draw((rows, width), deviation, logits,
                                                  self.generator))

    def _last_layer(self) -> list[nn.Linear]:
        """Return the last stage's layer where it is one linear layer whose W the last B can follow.

        It is in a list, for the network's own module not to become the rule's too.
        """
        weights = matrices_of(list(self.stages)[-1])
        found = [m for m in self.network.modules() if isinstance(m, nn.Linear)
                 and len(weights) == 1 and m.weight is weights[0]][:1]
        follows = self._hidden and self.feedback[self._hidden[-1].name].shape
        return [layer for layer in found if follows == layer.weight.shape]

    def _linears_after_first(self) -> list[nn.Linear]:
        owners = {id(m.weight): m for m in self.network.modules() if isinstance(m, nn.Linear)}
        linears = []
        for (_, lead, _, size), stage in zip(self._hidden, list(self.stages)[1:], strict=True):
            weights = [p for p in stage.parameters() if p.ndim > 1]
            if len(weights) != 1 or id(weights[0]) not in owners or (lead > 1 and len(size) > 1) \
                    or weights[0].shape[1] != size.numel():
                raise ValueError(
                    "feedback='sign_symmetric' needs one linear layer and no other weight in each "
                    f"stage after the first, got {[tuple(p.shape) for p in weights[:3]]} in stage "
                    f"{stage.name!r}; use 'random' or 'kolen_pollack'")
            linears.append(owners[id(weights[0])])
        return linears

    @torch.no_grad()
    def _products(self) -> dict[str, Tensor]:
        products: dict[str, Tensor] = {}
        if self._linears:
            product = self._linears[-1].weight
            for hidden, linear in zip(self._hidden[::-1], [None, *self._linears[-2::-1]],
                                      strict=True):
                product = product if linear is None else product @ linear.weight
                products[hidden.name] = product
        return products


class _Hidden(NamedTuple):
    """A hidden stage: its name, how many axes it shares with the logits, and the shape of B."""

    name: str
    lead: int
    rows: int
    size: torch.Size

    def check(self, h: Tensor, error: Tensor) -> None:
        """Raise ValueError unless B serves `h` and `error`."""
        lead, size = h.shape[:self.lead], h.shape[self.lead:]
        if (lead != error.shape[:self.lead] or error.shape[self.lead:].numel() != self.rows
                or (size != self.size and (len(size) != len(self.size) or any(
                    new > drawn for new, drawn in zip(size, self.size, strict=True))))):
            raise ValueError(
                f"x must give stage {self.name!r} an output of {('batch',) * self.lead} and at "
                f"most {tuple(self.size)}, as the example did, got {tuple(h.shape)} beside logits "
                f"of {tuple(error.shape)}; build the rule with an example like it")


def _ternary(error: Tensor, threshold: float, labels: Tensor) -> Tensor:
    """Return -1, 0 or 1 for each number of `error`, as the mean over so many `labels` has it."""
    return error.sign() * (error.abs() * labels > threshold) / labels.to(error.dtype)


def _part(size: torch.Size, drawn: torch.Size) -> tuple[slice, ...]:
    return () if size == drawn else (slice(None), *(slice(n) for n in size))


def _accumulate(B: Tensor, update: Tensor) -> None:
    update = update.to(B.dtype)
    if B.grad is None and update.shape == B.shape:
        B.grad = update
        return
    B.grad = torch.zeros_like(B) if B.grad is None else B.grad
    B.grad[_part(update.shape[1:], B.shape[1:])] += update
