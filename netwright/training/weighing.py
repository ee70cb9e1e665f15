"""How much a batch's loss counts beside the others of its step and of its epoch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule
from netwright.runtime import distributed
from netwright.runtime.modes import same_buffers
from netwright.runtime.random_state import same_random_state
from netwright.signals import mapped, tensors
from netwright.training.batches import targets

CLOSE = 1e-3  # how far two directions may be apart, and a sum's gradient from what it is alone


class Weigher:
    """What each batch's mean loss was divided by, found by putting a reference sample beside it.

    With w_r and w_B the weights of the reference and of the batch, the loss of both is
    (w_r L_r + w_B L_B) / (w_r + w_B), so that the gradient in the reference's output falls to
    w_r / (w_r + w_B) of what it is alone; where the loss is a sum it stays. So class weights,
    targets that are left out, and means over rows or elements are told apart for any function.
    The default loss is known, and its targets are counted.

    A loss of which this does not hold, such as one that contrasts samples, is `unlike`.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.loss: Any = getattr(rule, "loss", None)
        self.known = not callable(self.loss) or self.loss in (cross_entropy,
                                                              functional.cross_entropy)
        self.summed = False
        self.unlike = ""  # why it is neither a mean nor a sum, where it is not
        self.reference: list[list[Tensor]] | None = None  # tensors of its output, and of its y
        self.slope: Tensor | None = None  # the gradient in the reference's output, alone
        self._seen: tuple[Any, Any] | None = None

    @property
    def settled(self) -> bool:
        """Whether it is known by now how the loss counts."""
        return (self.known or self.summed or self.unlike != ""
                or self.reference is not None)

    def watching(self) -> AbstractContextManager[None]:
        """See in the body what the rule gives its loss, where that has to be seen."""
        return nullcontext() if self.known or self.summed or self.unlike else self._watching()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self._seen = None
        if isinstance(self.loss, nn.Module):
            handle = self.loss.register_forward_pre_hook(lambda _, given: self._see(*given))
            try:
                yield
            finally:
                handle.remove()
            return

        def seeing(output: Any, y: Any, *rest: Any, **options: Any) -> Any:
            self._see(output, y)
            return self.loss(output, y, *rest, **options)

        rule: Any = self.rule
        rule.loss = seeing
        try:
            yield
        finally:
            rule.loss = self.loss

    def _see(self, output: Any, y: Any, *_: Any) -> None:
        inner = any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors((output, y))))
        if self._seen is None and not inner:
            self._seen = mapped((output, y), Tensor.detach)

    def weight(self, x: Any, y: Any) -> float | Tensor:
        """Return how much the batch that was watched last counts, in targets."""
        self.settle(x, y)
        if self.reference is None or self.summed or self.unlike:
            return targets(y)
        found = self._tried(self._found, x, y)
        return targets(y) if found is None else found

    def settle(self, x: Any, y: Any) -> None:
        """Find by the batch that was watched last how the loss counts, unless it is known."""
        if not self.settled:
            self._tried(self._settle, x, y)

    def _tried(self, function: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
        """Return what a function finds from the output and its targets; note where it cannot."""
        try:
            with torch.enable_grad(), same_random_state(), self._same_loss():
                output, told = self._seen or (self.rule.predict(x), y)
                return function(mapped(output, _precise), told)
        except Exception as error:  # whatever a loss raises at a batch that has one sample more
            self.unlike = str(error) or type(error).__name__
            return None

    def agree(self) -> None:
        """Take one reference for all processes, the first that has found one."""
        kept = next((state for state in distributed.gather(self.state()) if state), None)
        if kept is not None:
            self.put_back(kept)

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps, None where nothing is known yet."""
        if self.known or not self.settled:
            return None
        plain = mapped([self.reference, self.slope], Tensor.cpu)
        return {"summed": self.summed, "unlike": self.unlike, "reference": plain[0],
                "slope": plain[1]}

    def put_back(self, state: dict[str, Any] | None) -> None:
        """Take up what `state` returned."""
        for name, value in (state or {}).items():
            setattr(self, name, value)

    def _same_loss(self) -> AbstractContextManager[None]:
        return same_buffers(self.loss) if isinstance(self.loss, nn.Module) else nullcontext()

    def _settle(self, output: Any, y: Any) -> None:
        """Choose the sample with the steepest loss, and find what another like it makes of it."""
        leaves = mapped(output, _leaf)
        parts = [t for t in tensors(leaves) if t.requires_grad]
        slopes = torch.autograd.grad(self.loss(leaves, y), parts, allow_unused=True)
        steep = sum(g.abs().flatten(1).sum(1) if g.ndim > 1 else g.abs()
                    for g in slopes if g is not None)
        assert isinstance(steep, Tensor)
        if not steep.any():
            return  # no target of this batch counts
        row = int(steep.argmax())
        sample = mapped((output, y), lambda t: t[row:row + 1])
        reference = [tensors(sample[0]), tensors(sample[1])]
        alone = mapped(sample[0], _leaf)
        parts = [t for t in tensors(alone) if t.requires_grad]
        slope = _flat(torch.autograd.grad(self.loss(alone, sample[1]), parts, allow_unused=True),
                      parts)
        if not slope.any():
            raise ValueError("the loss of a sample alone does not depend on its output")
        self.reference, self.slope = reference, slope
        twice = float(self._part(*sample))
        self.summed = abs(twice - 1) < CLOSE
        if not self.summed and not abs(twice - 0.5) < CLOSE:
            raise ValueError("twice the same sample has another loss than the sample alone")

    def _found(self, output: Any, y: Any) -> float | Tensor:
        assert self.reference is not None
        weight = (1 / self._part(output, y) - 1) * max(1, targets(self.reference[1]))
        whole = weight.round()  # a plain mean counts what it counts, but for rounding
        weight = torch.where((weight - whole).abs() < CLOSE * 0.1 * whole, whole, weight)
        return weight if weight.is_cuda else float(weight)

    def _part(self, output: Any, y: Any) -> Tensor:
        """Return which part of its gradient the reference has beside a batch."""
        assert self.reference is not None
        assert self.slope is not None
        outputs = [_leaf(t.to(device)) for t, device in _with_devices(self.reference[0], output)]
        ys = [t.to(device) for t, device in _with_devices(self.reference[1], y)]
        loss = self.loss(_beside(outputs, output), _beside(ys, y))
        parts = [t for t in outputs if t.requires_grad]
        slope, alone = _flat(torch.autograd.grad(loss, parts, allow_unused=True), parts), \
            self.slope.to(loss.device)
        part = (slope @ alone) / (alone @ alone)
        if not part.is_cuda and not (0 < part < 1 + CLOSE and
                                     (slope - part * alone).norm() < CLOSE * slope.norm()):
            raise ValueError("the loss of a sample depends on which others are beside it")
        return part


def _leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_() if t.is_floating_point() else t


def _precise(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t


def _with_devices(kept: list[Tensor], like: Any) -> list[tuple[Tensor, torch.device]]:
    return [(t, other.device) for t, other in zip(kept, tensors(like), strict=True)]


def _beside(kept: list[Tensor], batch: Any) -> Any:
    """Return a batch with one sample more."""
    parts = iter(kept)
    return mapped(batch, lambda t: torch.cat([next(parts), t]))


def _flat(slopes: tuple[Tensor | None, ...], parts: list[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(t) if g is None else g).flatten()
                      for g, t in zip(slopes, parts, strict=True)])
