"""Rules in several processes: what a network in DistributedDataParallel asks of them."""

import copy
import sys
from typing import Any

from torch import Generator, distributed, nn
from torch.nn.parameter import is_lazy

from netwright.runtime.distributed import (
    average_gradients,
    share_buffers,
    share_generators,
    share_weights,
)


def is_parallel(network: nn.Module) -> bool:
    """Whether `network` is a module in DistributedDataParallel."""
    return isinstance(network, nn.parallel.DistributedDataParallel)


class Processes:
    """Keep what a rule holds equal in all processes, as DistributedDataParallel does a network's.

    Most rules differentiate parts of the network by themselves, which DistributedDataParallel does
    not see, and have parameters of their own. So the rule takes the network out of it, begins with
    process 0's weights, buffers and generators, and averages `.grad` of all its parameters after
    each call, unless that is inside `no_sync()`.

        g = sum_r g_r / processes
    """

    def __init__(self, rule: Any, parallel: Any) -> None:
        _check_averages(rule)
        if parallel.process_group is not distributed.group.WORLD:
            raise ValueError("network must be in DistributedDataParallel with all processes, got "
                             "one with a process group of its own; leave process_group out")
        self.parallel, self.begun = parallel, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        again = copy.copy(self)
        again.begun = False
        return again

    def before(self, rule: Any) -> None:
        """Give every process what process 0 has, where it may be another."""
        _check_averages(rule)
        if any(map(is_lazy, rule.parameters())):
            raise ValueError(f"{type(rule).__name__} must know its parameters' sizes to train in "
                             "several processes, got some that the first batch will make; give "
                             "example=")
        if not self.begun:
            share_weights(rule)
            share_generators([value for module in rule.modules()
                              for value in vars(module).values() if isinstance(value, Generator)])
            self.begun = True
        elif self.parallel.broadcast_buffers:
            share_buffers(rule)

    def after(self, rule: Any) -> None:
        """Average the gradients over the processes."""
        if self.parallel.require_backward_grad_sync:
            learning = [p for p in rule.parameters() if p.requires_grad]
            average_gradients(learning, 0.0, 1, next(rule.parameters()).device)


def _check_averages(rule: Any) -> None:
    if rule.updates_weights:
        raise ValueError(f"{type(rule).__name__} changes the weights itself and leaves no "
                         "gradients to average, so it trains in one process; take the network out "
                         "of DistributedDataParallel, or use another rule")


def is_cut_up(network: nn.Module) -> bool:
    """Whether a part of each parameter is in this process, the whole only while its module runs."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in network.modules()):
        return True
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(p, tensors.DTensor)
                                       for p in network.parameters())


def refuse_parts(rule: nn.Module, network: nn.Module) -> None:
    """Raise ValueError where `rule` cannot train a network that `fully_shard` has cut up."""
    if is_cut_up(network):
        name = type(rule).__name__
        raise ValueError(
            f"network must be whole in each process for {name}, which runs parts of it by "
            "themselves, got one that fully_shard has cut up; write "
            f"{name}(DistributedDataParallel(network), ...), or Backprop(network), which runs it "
            "as a whole")
