from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from netwright.catalogue.facets import method
from netwright.errors import CannotStage
from netwright.measure._batch import check_batch
from netwright.measure._untouched import untouched
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule
from netwright.runtime.modes import training
from netwright.stages import call, stages

__all__ = ["alignment"]


@method("measure", needs=["labels"])
def alignment(rule: Rule, batch: tuple[Any, Tensor]) -> dict[str, float]:
    """Return, for each stage, the cosine between the rule's update and the exact gradient.

    a_i = <u_i, g_i> / (|u_i| |g_i|);  g = dL/dw of the whole network.

    L is the rule's own `loss`, cross-entropy where it has none. Both see the same batch in train
    mode under the same random state, and the rule is left exactly as it was. u is what the rule
    puts into `.grad`, or the change of the weights with its sign turned where the rule changes
    them itself. 1 is the exact direction, 0 an unrelated one.

    Stages without a trainable parameter are left out. A stage whose update or exact gradient is
    zero has nan. The result is empty where the rule moves no parameter of `rule.network`, as
    where it trains copies or heads of its own: then there is nothing to compare. A network that
    cannot be staged counts as one stage, called `network`.

    Args:
        rule: whose update is compared.
        batch: the pair (x, y) that it is made on.

    Raises:
        ValueError: `batch` is not a pair.

    >>> from torch import nn
    >>> from netwright.rules import Backprop
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> found = alignment(Backprop(network), (torch.randn(16, 4), torch.arange(16) % 3))
    >>> {stage: round(cosine, 3) for stage, cosine in found.items()}
    {'0': 1.0, '2': 1.0}
    """
    check_batch(batch)
    x, y = batch
    trained = [p for p in rule.network.parameters() if p.requires_grad]
    if not trained:
        return {}
    with untouched(rule), training(rule):
        before = [p.detach().clone() for p in trained] if rule.updates_weights else []
        rule(x, y)
        if rule.updates_weights:
            updates = [old - p.detach() for old, p in zip(before, trained, strict=True)]
        else:
            updates = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    if not any(bool(u.any()) for u in updates):
        return {}
    with untouched(rule), training(rule), torch.enable_grad():
        loss = getattr(rule, "loss", cross_entropy)(call(rule.network, x), y)
        exact = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    with untouched(rule):
        groups = _groups(rule, x)
    pairs = {p: (u, g) for p, u, g in zip(trained, updates, exact, strict=True)}
    return {name: _cosine([pairs[p] for p in group]) for name, group in groups.items()}


def _groups(rule: Rule, x: Any) -> dict[str, list[Parameter]]:
    try:
        chain = {stage.name: stage.parameters() for stage in stages(rule.network, x)}
    except CannotStage:
        chain = {"network": list(rule.network.parameters())}
    learning = {name: [p for p in group if p.requires_grad] for name, group in chain.items()}
    return {name: group for name, group in learning.items() if group}


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    u = torch.cat([update.detach().flatten().double() for update, _ in pairs])
    g = torch.cat([gradient.flatten().double() for _, gradient in pairs])
    scale = u.norm() * g.norm()
    return float(u @ g / scale) if scale > 0 else float("nan")
