"""What a rule holds besides its network, which the loops of other libraries do not know of."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netwright.errors import CorruptCheckpoint
from netwright.rules.rule import Rule

FILE = "rule.safetensors"  # beside the network's own files
_GENERATOR = "generator"


def check_can_be_driven(rule: Any, where: str) -> None:
    """Raise ValueError unless a rule speaks through `.grad`, which is all that a loop steps on."""
    if not isinstance(rule, Rule):
        raise ValueError(f"rule must be a rule, got {type(rule).__name__}; write "
                         f"{where}(nw.rules.Backprop(model), ...)")
    if rule.updates_weights:
        raise ValueError(f"rule must leave its update in .grad, which {where} steps on, but "
                         f"{type(rule).__name__} changes the weights itself; train it with nw.fit")


def additions(rule: Rule) -> dict[str, Tensor]:
    """Return the tensors of a rule's state that are not its network's, by name.

    >>> from torch import nn
    >>> from netwright.rules import Backprop, MonoForward
    >>> network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(),
    ...                         nn.Linear(5, 3))
    >>> list(additions(Backprop(network)))
    []
    >>> list(additions(MonoForward(network, num_classes=3)))
    ['projections.0.linear.weight', 'projections.1.linear.weight']
    """
    known = {id(t) for t in [*rule.network.parameters(), *rule.network.buffers()]}
    return {name: t for name, t in rule.state_dict(keep_vars=True).items()
            if isinstance(t, Tensor) and id(t) not in known and not name.startswith("network.")}


def keep_additions(rule: Rule, folder: Path) -> None:
    """Write what a rule adds, and where its generator stands, beside the network."""
    from safetensors.torch import save_file
    held = {name: t.detach().cpu().clone().contiguous() for name, t in additions(rule).items()}
    if rule.generator is not None:
        held[_GENERATOR] = rule.generator.get_state()
    if held:
        save_file(held, folder / FILE)


@torch.no_grad()
def take_up_additions(rule: Rule, folder: Path) -> None:
    """Read what `keep_additions` wrote.

    Raises:
        CorruptCheckpoint: the file is missing, damaged, or another rule's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    here, path = additions(rule), folder / FILE
    if not here and rule.generator is None:
        return
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{path}, which holds what {type(rule).__name__} adds to its "
                                f"network, cannot be read ({error}); restore it, or begin "
                                "anew") from error
    state = held.pop(_GENERATOR, None)
    wrong = [name for name in {**here, **held} if name not in here or name not in held
             or held[name].shape != here[name].shape]
    if wrong:
        raise CorruptCheckpoint(f"{path} is another rule's: {wrong[0]} does not fit "
                                f"{type(rule).__name__}; build the rule as it was")
    for name, t in here.items():
        t.copy_(held[name])
    if state is not None and rule.generator is not None:
        rule.generator.set_state(state)
