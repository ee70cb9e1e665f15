"""Which positions of a batch are real and which are padding, held while a network runs on it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# How the arguments that say it are called: those that are 0, and those that are True, at padding.
_REAL = ("attention_mask",)
_PADDED = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")
# How the first argument of a module is called that begins a stream of positions.
_INPUTS = ("input_ids", "inputs_embeds", "input_features", "decoder_input_ids", "src", "tgt")
_CACHES = ("past_key_values", "cache_params")

_held: list[tuple[Any, Tensor | None]] = []


def held() -> Tensor | None:
    """Return which positions of the batch that runs now are real; None where nobody said it."""
    return _held[-1][1] if _held else None


@contextmanager
def holding(real: Tensor | None) -> Iterator[None]:
    """Let modules that run in the body know which positions are real, (batch, length).

    >>> with holding(torch.tensor([[1, 1, 0]])):
    ...     real_rows(torch.tensor([[[1.0], [2.0], [9.0]]]))
    tensor([[1.],
            [2.]])
    """
    entry = (None, None if real is None else real != 0)
    _held.append(entry)
    try:
        yield
    finally:
        # By identity: an outer entry may be equal, and something inside may have been cut off.
        del _held[next((i for i, some in enumerate(_held) if some is entry), len(_held)):]


def real_of(x: Tensor, real: Tensor | None = None) -> Tensor | None:
    """Return which vectors of x (*, dim) are real, (*), by `real` or what is held; None if all are.

    What is held is of another stream where it has another shape; vectors may also stand in one
    row, (batch * length, dim).
    """
    real = held() if real is None else real
    if real is None:
        return None
    shape = x.shape[:-1]
    if real.shape == shape:
        return real.to(x.device)
    if len(shape) == 1 and real.numel() == shape[0]:
        return real.reshape(-1).to(x.device)
    return None


def real_rows(x: Tensor) -> Tensor:
    """Return the vectors of x (*, dim) that are no padding, (rows, dim)."""
    real = real_of(x)
    return x.reshape(-1, x.shape[-1]) if real is None else x[real]


def read_padding(network: nn.Module) -> list[RemovableHandle]:
    """Let `network` hold, in each of its passes, which positions its arguments call real.

    Every module in it that begins a stream of positions does so for what runs in it, the encoder
    and the decoder each for itself: by `attention_mask`, or PyTorch's `src_key_padding_mask`,
    `tgt_key_padding_mask` and `key_padding_mask`. The handles take that back.

    >>> class Rows(nn.Module):
    ...     def forward(self, x, attention_mask=None):
    ...         return real_rows(x)
    >>> network = Rows()
    >>> handles = read_padding(network)
    >>> network(torch.ones(2, 3, 4), attention_mask=torch.tensor([[1, 0, 0], [1, 1, 0]])).shape
    torch.Size([3, 4])
    """
    handles = []
    for module in network.modules():
        if any(isinstance(hook, Reader) for hook in module._forward_pre_hooks.values()):
            continue
        names = _names(module)
        if set(names) & {*_REAL, *_PADDED} and (module is network or set(names) & {*_INPUTS}):
            handles += [module.register_forward_pre_hook(Reader(module, names), with_kwargs=True),
                        module.register_forward_hook(_release, always_call=True)]
    return handles


class Reader:
    """A hook that holds what a call of a module says of padding."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.batch_first = all(m.batch_first for m in module.modules()
                               if isinstance(m, nn.MultiheadAttention))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold it until the module has returned."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        real = real_positions(given)
        _held.append((module, real if real is None or self.batch_first else real.T))


def _release(module: nn.Module, args: Any, output: Any) -> None:
    if _held and _held[-1][0] is module:
        _held.pop()


def real_positions(given: Mapping[str, Any]) -> Tensor | None:
    """Return which positions are real (batch, length) by the arguments of a call, None if all are.

    A mask of each query's keys, (batch, *, queries, keys), calls real what any query sees.

    >>> real_positions({"attention_mask": torch.tensor([[0, 1]])})
    tensor([[False,  True]])
    >>> real_positions({"src_key_padding_mask": torch.tensor([[True, False]])})
    tensor([[False,  True]])
    """
    real = next((_seen(mask) for name in _REAL
                 if isinstance(mask := given.get(name), Tensor)), None)
    if real is None:
        real = next((~mask if mask.dtype == torch.bool else mask > -1e4 for name in _PADDED
                     if isinstance(mask := given.get(name), Tensor)), None)
    if real is None or real.ndim != 2:
        return None
    length = next((x.shape[1] for name in _INPUTS
                   if isinstance(x := given.get(name), Tensor) and x.ndim > 1), real.shape[1])
    if length < real.shape[1] and any(given.get(name) is not None for name in _CACHES):
        return real[:, real.shape[1] - length:]  # the mask is that of what is in the cache as well
    return real


def _seen(mask: Tensor) -> Tensor:
    if mask.ndim < 3:
        return mask != 0
    allowed = mask > -1e4 if mask.is_floating_point() else mask != 0
    return allowed.flatten(1, -2).any(1)


def _names(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward that is no function of Python's
        return []
