"""A recipe carried out on a network of one's own, without training it."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.compare.changes import Change
from netwright.compare.recipe import Recipe
from netwright.compare.recipe import recipe as read
from netwright.compare.steps import Step
from netwright.compare.supplies import parameters
from netwright.tasks import Parts, Task

__all__ = ["apply"]


@checks.annotated
def apply(recipe: Any, model: nn.Module, calibration: Any) -> nn.Module:
    """Return a copy of `model` that the reshapes and blocks of `recipe` have changed.

    Args:
        recipe: what `nw.recipe` reads; only its network is changed, and nothing is trained.
        model: any module.
        calibration: what the model takes, or a list of such batches; what the reshapes look at.
            A step that learns from a teacher is given `model`.

    Raises:
        ValueError: the recipe names a rule, a loss, an optimizer or what is done to data, or
            `calibration` holds no batch.
        NothingToReshape: the model has no place for a block, or nothing for a reshape.

    >>> from netwright.models import gpt
    >>> model, x = gpt(96, context=16), torch.zeros(2, 16, dtype=torch.long)
    >>> small = apply("prune_sublayers(remove=1) + GLU(hidden=32)", model, x)
    >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    True
    """
    found = read(recipe)
    others = [slot for slot, _ in found.steps() if slot != "network"]
    if others:
        raise ValueError(f"recipe must change the network alone, got {found} with the slot "
                         f"{others[0]!r}; train by netwright.compare, or leave it out")
    batches = calibration if isinstance(calibration, list) else [calibration]
    if not batches:
        raise ValueError("calibration must hold at least one batch, got an empty list")
    # Nothing is trained, so that no label is looked at.
    pairs = [(x, torch.zeros(1)) for x in batches]
    task = Task("model", partial(deepcopy, model), Parts(pairs, pairs, pairs), example=batches[0])
    looking = tuple(_looking(step, batches, model) for step in found.network)
    return Change(str(found), Recipe(looking)).change(deepcopy(model), task, {})


def _looking(step: Step, batches: list[Any], model: nn.Module) -> Step:
    """Return a step that looks at all batches, and learns from the model, where it does either."""
    known = parameters(step.what)
    given = {"calibration": batches, "teacher": model}
    return Step(step.what, {**{name: value for name, value in given.items() if name in known},
                            **step.arguments})
