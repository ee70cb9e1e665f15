"""Training in several processes: who takes part, and what they hold in common."""

import atexit
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import Parameter

from netwright.runtime.random_state import generator_state, set_generator_state

BUCKET_BYTES = 25 * 2**20


def join(device: torch.device) -> None:
    """Join the processes that `torchrun` started, where it did and nobody has joined them yet."""
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if started and distributed.is_available() and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)


def rank() -> int:
    """Return this process's number."""
    return distributed.get_rank() if _joined() else 0


def world() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if _joined() else 1


def wait() -> None:
    """Wait until every process is here."""
    distributed.barrier()


@torch.no_grad()
def share_weights(rule: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0."""
    for tensor in [*rule.parameters(), *rule.buffers()]:
        _broadcast(tensor)


@torch.no_grad()
def share_buffers(rule: nn.Module) -> None:
    """Give every process the buffers of process 0, such as its running statistics."""
    for tensor in rule.buffers():
        _broadcast(tensor)


def share_generators(generators: Iterable[Any]) -> None:
    """Give every process the state of process 0's generators."""
    for generator in generators:
        state = [generator_state(generator)]
        distributed.broadcast_object_list(state, src=0)
        set_generator_state(generator, state[0])


def gather(value: Any) -> list[Any]:
    """Return every process's `value`, in the order of their numbers."""
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def summed(tensor: Tensor) -> Tensor:
    """Return the sum of the processes' tensors, the tensor itself where there is one process."""
    if world() == 1:
        return tensor
    whole = tensor.clone()
    distributed.all_reduce(whole)
    return whole


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of `values` over the processes."""
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(summed)
    return summed.tolist()


@torch.no_grad()
def average_gradients(parameters: Sequence[Parameter], loss: float, samples: float,
                      device: torch.device) -> tuple[float, float]:
    """Average `.grad` over the processes, weighted by samples; return the loss and all samples.

    g = sum_r n_r g_r / sum_r n_r

    A parameter without a gradient in one process counts as zero there, and stays without one
    where no process has one.
    """
    present = [float(p.grad is not None) for p in parameters]
    sparse = [float(p.grad is not None and p.grad.is_sparse) for p in parameters]
    weighted = loss * samples if samples else 0.0
    weighted, everyone, *anywhere = total([weighted, samples, *present, *sparse], device)
    shared = [p for p, count in zip(parameters, anywhere, strict=False) if count]
    for bucket in _buckets(shared):
        gradients = [torch.zeros_like(p) if p.grad is None else
                     p.grad.to_dense() if p.grad.is_sparse else p.grad for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients]).mul_(samples / (everyone or 1))
        distributed.all_reduce(flat)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view(p.shape).clone(memory_format=torch.preserve_format)
    for p, count in zip(parameters, anywhere[len(parameters):], strict=True):
        if count and p.grad is not None:  # an optimizer of sparse gradients takes no others
            p.grad = p.grad.to_sparse(1)
    return weighted / (everyone or 1), everyone


def _buckets(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    kinds: dict[tuple, list[Parameter]] = {}
    for p in parameters:
        bucket = kinds.setdefault((p.dtype, p.device), [])
        bucket.append(p)
        if sum(q.numel() * q.element_size() for q in bucket) >= BUCKET_BYTES:
            yield kinds.pop((p.dtype, p.device))
    yield from kinds.values()


def _broadcast(tensor: Tensor) -> None:
    whole = tensor.detach().contiguous()
    distributed.broadcast(whole, src=0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _leave() -> None:
    if _joined():
        distributed.destroy_process_group()
