"""The random states that passes draw from: PyTorch's global ones, Python's and numpy's."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Generator, Tensor


class RandomState(NamedTuple):
    """The global random states: of PyTorch's CPU and CUDA devices, of Python and of numpy."""

    torch: Tensor
    cuda: list[Tensor]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]


def random_state() -> RandomState:
    """Return the global random states; CUDA's of every device, once that is in use."""
    state: Any = numpy.random.get_state(legacy=True)
    return RandomState(*torch_random_state(), random.getstate(), state)


def set_random_state(state: RandomState) -> None:
    """Set the global random states to what `random_state` returned."""
    set_torch_random_state(state[:2])
    random.setstate(state.python)
    numpy.random.set_state(state.numpy)


def same_draws(one: RandomState, other: RandomState) -> bool:
    """Return whether nothing was drawn between two states."""
    return same_torch_draws(one[:2], other[:2]) and same_draws_elsewhere(one, other)


def same_draws_elsewhere(one: RandomState, other: RandomState) -> bool:
    """Return whether nothing was drawn from Python's and numpy's between two states."""
    return (one.python == other.python and one.numpy[2:] == other.numpy[2:]
            and numpy.array_equal(one.numpy[1], other.numpy[1]))


def torch_random_state() -> tuple[Tensor, list[Tensor]]:
    """Return PyTorch's alone, which takes a thirtieth of the time."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def set_torch_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Set PyTorch's global random states to what `torch_random_state` returned."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def same_torch_draws(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    """Return whether nothing was drawn from PyTorch's between two states."""
    return (torch.equal(one[0], other[0]) and len(one[1]) == len(other[1])
            and all(map(torch.equal, one[1], other[1])))


@contextmanager
def same_random_state() -> Iterator[None]:
    """Undo whatever the body draws from the global random states.

    >>> with same_random_state():
    ...     first = torch.rand(3)
    >>> torch.equal(first, torch.rand(3))
    True
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def replaying(state: RandomState) -> Iterator[None]:
    """Draw in the body what was drawn after `state`; leave the global state as it was."""
    with same_random_state():
        set_random_state(state)
        yield


@contextmanager
def drawing_from(generator: Generator | None) -> Iterator[None]:
    """Let what the body draws follow `generator`, where one is given, and leave the global state.

    >>> with drawing_from(torch.Generator().manual_seed(0)):
    ...     first = torch.rand(3)
    >>> with drawing_from(torch.Generator().manual_seed(0)):
    ...     torch.equal(first, torch.rand(3))
    True
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with same_random_state():
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        yield


def every_random_state(generators: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the random states, and those of `generators`, as what a checkpoint can hold."""
    state = random_state()
    _, keys, *rest = state.numpy
    return {"torch": state.torch, "python": state.python,
            "numpy": [torch.from_numpy(numpy.asarray(keys, "int64")), *rest],
            "cuda": state.cuda,
            "generators": [generator_state(generator) for generator in generators]}


def set_every_random_state(state: Mapping[str, Any], generators: Sequence[Any] = ()) -> None:
    """Put back what `every_random_state` returned."""
    keys, *rest = state["numpy"]
    cuda = state["cuda"] if torch.cuda.is_available() else []
    set_random_state(RandomState(state["torch"], cuda, state["python"],
                                 ("MT19937", keys.numpy().astype("uint32"), *rest)))
    for generator, value in zip(generators, state["generators"], strict=True):
        set_generator_state(generator, value)


def is_generator(value: Any) -> bool:
    """Return whether a value is a generator of PyTorch, numpy or Python that can be put back."""
    return isinstance(value, (Generator, numpy.random.Generator, numpy.random.BitGenerator,
                              numpy.random.RandomState, random.Random)
                      ) and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """Return a generator's state as tensors, numbers and strings.

    >>> dice = random.Random(0)
    >>> state, first = generator_state(dice), dice.random()
    >>> set_generator_state(dice, state)
    >>> dice.random() == first
    True
    """
    if isinstance(generator, Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _without_arrays(generator.get_state(legacy=False) if isinstance(
        generator, numpy.random.RandomState) else _bits(generator).state)


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a generator where `generator_state` found it."""
    if isinstance(generator, Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(_with_arrays(state))
    else:
        _bits(generator).state = _with_arrays(state)


@contextmanager
def from_one_start(generators: Sequence[Any] = ()) -> Iterator[None]:
    """Let the body draw the same whenever it runs, and then put every random state back.

    >>> draws = []
    >>> for _ in range(2):
    ...     with from_one_start():
    ...         draws.append(torch.rand(()).item() + random.random())
    >>> draws[0] == draws[1]
    True
    """
    before = every_random_state(generators)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    for generator in generators:
        _start(generator)
    try:
        yield
    finally:
        set_every_random_state(before, generators)


def _start(generator: Any) -> None:
    if isinstance(generator, Generator):
        generator.manual_seed(0)
    elif isinstance(generator, (random.Random, numpy.random.RandomState)):
        generator.seed(0)
    else:
        bits: Any = _bits(generator)
        bits.state = type(bits)(0).state


def _bits(generator: Any) -> Any:
    return getattr(generator, "bit_generator", generator)


def _without_arrays(state: Any) -> Any:
    if isinstance(state, numpy.ndarray):
        return [int(number) for number in state]
    return ({key: _without_arrays(value) for key, value in state.items()}
            if isinstance(state, dict) else state)


def _with_arrays(state: Any) -> Any:
    if isinstance(state, list):
        return numpy.array(state, "uint64")
    return ({key: _with_arrays(value) for key, value in state.items()}
            if isinstance(state, dict) else state)
