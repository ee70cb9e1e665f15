import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import CorruptCheckpoint, NothingToReshape
from netwright.masks import Masks
from netwright.reshape.pruning._weights import weight_layers
from netwright.runtime.files import flush

__all__ = ["Ticket", "find_ticket"]

SETTINGS = "settings.json"

# Trains a model in place, its zeros held by `masks.hold(model, optimizer)`; it may yield once a
# step, so that weights of early steps can be kept.
Train = Callable[[nn.Module, Masks], Iterator[Any] | None]


class Ticket(NamedTuple):
    """Masks that were found, and the weights that they go with: a `state_dict`."""

    masks: Masks
    initial: dict[str, Tensor]

    def model(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Return a network of `make` with the ticket's weights, zero where there is no weight."""
        model = make()
        model.load_state_dict(self.initial)
        return self.masks.apply(model)


@method("companion", needs=["training", "labels"], saves=["parameters"])
def find_ticket(make: Callable[[], nn.Module], train: Train, *, rounds: int, rate: float = 0.2,
                rewind: int = 0, folder: str | Path | None = None) -> Ticket:
    """Return a sparse network with early weights that trains as a dense one does, if there is one.

    In each round the network is trained, in each layer the share `rate` of the smallest weights
    that are left is taken away (half of it in the last layer), and those that stay go back to
    what they were at step `rewind`:  θ := θ_rewind ⊙ m.

    `train(model, masks)` trains in place and keeps zeros by `masks.hold(model, optimizer)`. Where
    `rewind` is above 0 it is a generator that yields once after each step.

    Args:
        make: makes the network, the same one each time it is called with the same random state.
        train: trains it, see above.
        rounds: how often weights are taken away.
        rate: the share of each layer that goes in a round.
        rewind: the step whose weights those that stay go back to.
        folder: where each round is kept; a call that was broken off goes on from there.

    Raises:
        CorruptCheckpoint: what `folder` holds cannot be read, or is another call's.
        NothingToReshape: the network has no linear layer or convolution.
        TypeError: `rewind` is above 0 and `train` is no generator.
        ValueError: `rounds` is below 1, `rate` is not above 0 and below 1, `rewind` is below 0 or
            beyond the last step.

    Paper: Frankle, Carbin, 2019, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
    Networks.

    >>> def train(model, masks):
    ...     optimizer = torch.optim.Adam(model.parameters())
    ...     masks.hold(model, optimizer)
    ...     model(torch.randn(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> ticket = find_ticket(lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), train,
    ...                      rounds=2, rate=0.5)
    >>> [int(mask.sum()) for mask in ticket.masks.values()]
    [8, 9]
    """
    checks.count(1, rounds=rounds)
    checks.between(0, 1, ends=(False, False), rate=rate)
    checks.count(0, rewind=rewind)
    model = make()
    initial = {name: t.detach().clone() for name, t in model.state_dict().items()}
    names = [f"{name}.weight".lstrip(".") for name in weight_layers(model, None).layers]
    if not names:
        raise NothingToReshape(f"{type(model).__name__} has no layer to prune")
    masks = Masks({name: torch.ones_like(model.get_parameter(name), dtype=torch.bool)
                   for name in names})
    settings = {"rate": rate, "rewind": rewind,
                "weights": {name: list(mask.shape) for name, mask in masks.items()}}
    done, masks, initial = _known(folder, settings, rounds, masks, initial)
    for number in range(done, rounds):
        model.load_state_dict(initial)
        masks.apply(model)
        early = _trained(model, train, masks, rewind if number == 0 else 0)
        initial = early or initial
        masks = _pruned(model, masks, names, rate, number + 1)
        _keep(folder, settings, number + 1, masks, initial)
    return Ticket(masks, {name: t * masks[name] if name in masks else t
                          for name, t in initial.items()})


def _trained(model: nn.Module, train: Train, masks: Masks,
             rewind: int) -> dict[str, Tensor] | None:
    """Train; return the state at step `rewind`, None where that is the first."""
    steps = train(model, masks)
    if steps is None:
        if rewind:
            raise TypeError(f"train must be a generator that yields after each step for "
                            f"rewind={rewind}, got a function that returns nothing; yield in its "
                            "loop, or rewind to 0")
        return None
    found = None
    for step, _ in enumerate(steps, start=1):
        if step == rewind:
            found = deepcopy(model.state_dict())
    if rewind and found is None:
        raise ValueError(f"rewind must be a step of the training, got {rewind}, which it did not "
                         "reach; train for longer, or rewind to an earlier one")
    return found


@torch.no_grad()
def _pruned(model: nn.Module, masks: Masks, names: list[str], rate: float, number: int) -> Masks:
    """Return masks without the smallest of the weights that are left after `number` rounds."""
    found = {}
    for name in names:
        share = rate / 2 if name == names[-1] and len(names) > 1 else rate
        sizes = model.get_parameter(name).abs().masked_fill(~masks[name], -1).flatten()
        left = max(1, math.floor(len(sizes) * (1 - share) ** number + 0.5))
        mask = torch.zeros(len(sizes), dtype=torch.bool)
        mask[sizes.topk(left).indices.cpu()] = True
        found[name] = mask.view_as(masks[name])
    return Masks(found)


def _known(folder: str | Path | None, settings: dict[str, Any], rounds: int, masks: Masks,
           initial: dict[str, Tensor]) -> tuple[int, Masks, dict[str, Tensor]]:
    """Return how many of the rounds `folder` holds, and what the last of them gave."""
    place = Path(folder) if folder is not None else None
    if place is None or not (place / SETTINGS).exists():
        return 0, masks, initial
    try:
        before = dict(json.loads((place / SETTINGS).read_text(encoding="utf-8")))
        other = [name for name, value in settings.items() if before.get(name) != value]
        done = max((number for path in place.glob("*.masks")
                    if (number := int(path.stem)) <= rounds), default=0)
        found = (done, Masks.load(place / f"{done}.masks") if done else masks,
                 load_file(place / "initial.safetensors") if done else initial)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CorruptCheckpoint(f"folder: {place} cannot be read ({error}); remove it to begin "
                                "anew") from error
    if other:
        raise CorruptCheckpoint(f"folder: {place} belongs to another call, with other "
                                f"{' and '.join(other)}; name another folder, or remove it to "
                                "begin anew")
    return found


def _keep(folder: str | Path | None, settings: dict[str, Any], number: int, masks: Masks,
          initial: dict[str, Tensor]) -> None:
    if folder is None:
        return
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / SETTINGS).exists():
        part = place / f"{SETTINGS}.part"
        part.write_text(json.dumps(settings), encoding="utf-8")
        flush(part)
        part.replace(place / SETTINGS)
    if not (place / "initial.safetensors").exists():
        part = place / "initial.part"
        save_file({name: t.contiguous() for name, t in initial.items()}, part)
        flush(part)
        part.replace(place / "initial.safetensors")
    masks.save(place / f"{number}.masks")
