from collections.abc import Iterator

from torch import Tensor, nn

from netwright.catalogue.facets import method
from netwright.reshape.change import Reshaped, changes

__all__ = ["original_state"]


@method("companion")
def original_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state by the names that it had before its blocks were put into stacks.

    `reversible` and `parallelize_residual` move blocks; what was trained there can so be loaded
    into the network as it was made: `network.load_state_dict(original_state(model))`. Other
    changes stay as they are.

    >>> import torch
    >>> from netwright.models import gpt
    >>> from netwright.reshape import reversible
    >>> network = gpt(96, context=16)
    >>> flat = reversible(network, torch.zeros(1, 16, dtype=torch.long))
    >>> network.load_state_dict(original_state(flat))
    <All keys matched successfully>
    """
    state = dict(model.state_dict())
    for record in reversed(changes(model)):
        moves = list(_moves(record))
        state = {_back(name, moves): tensor for name, tensor in state.items()}
    return state


def _moves(record: Reshaped) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of names that a change gave, and those before."""
    inside = {"reversible": "block.", "parallelize_residual": ""}.get(record.name)
    if inside is None:
        return
    for run in record.decision.get("runs") or record.decision["groups"]:
        for k, block in enumerate(run):
            yield f"{run[0]['name']}.blocks.{k}.{inside}", f"{block['name']}."


def _back(name: str, moves: list[tuple[str, str]]) -> str:
    for new, old in moves:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name
