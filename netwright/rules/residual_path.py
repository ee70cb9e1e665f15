"""Which parts of a stage lie on its residual path, read off the graph."""

from torch import Tensor

# What passes a gradient on as it is, in the graph of an addition.
IDENTITIES = ("AddBackward0", "ToCopyBackward0")


def is_added(start: Tensor, end: Tensor) -> bool:
    """Return whether `end` is `start` plus something, by the graph between them.

    >>> import torch
    >>> h = torch.ones(2, requires_grad=True).view(2)
    >>> is_added(h, h + h.exp()), is_added(h, (h + 1).exp())
    (True, False)
    """
    nodes = [end.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is start.grad_fn:
            return True
        if node is not None and node.name() in IDENTITIES:
            scaled = getattr(node, "_saved_alpha", 1) != 1  # a + alpha b
            nodes += [parent for parent, _ in node.next_functions[:1 if scaled else None]]
    return False
