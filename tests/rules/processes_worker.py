"""Rules around DistributedDataParallel, run by test_processes.py alone and under torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from netwright.catalogue.facets import methods
from netwright.contracts.check_rule import ordinary_network
from netwright.contracts.checks import cast, offered, variants
from netwright.rules import Backprop, MonoForward, Rule

X = torch.randn(24, 20, generator=Generator().manual_seed(2), dtype=torch.float64)
Y = torch.arange(24) % 3
RULES = {entry.name: entry for entry in methods().values() if entry.facets.kind == "rule"}
WAYS = {f"{rule} ({label})": (rule, dict(arguments)) for rule, entry in RULES.items()
        for label, arguments in variants(entry.value).items()}


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def batch(rule: str) -> tuple[Any, Any]:
    """Return a batch, which is shared out unless it is one that the rule says it is tried on."""
    made = RULES[rule].facets.batch
    if made is not None:
        torch.manual_seed(3)
        return cast(made(), torch.float64)
    return (X[rank()::2], Y[rank()::2]) if distributed.is_initialized() else (X, Y)


def build(rule: str, arguments: dict[str, Any]) -> Rule:
    entry = RULES[rule]
    torch.manual_seed(rank())  # each process draws others
    network = (entry.facets.network or ordinary_network)().double()
    if distributed.is_initialized():
        network = DistributedDataParallel(network)
    made: Rule = entry.value(network, **offered(
        entry.value, example=batch(rule)[0], generator=Generator().manual_seed(7 + rank())),
        **arguments)
    return made


def trained(rule: Rule, x: Any, y: Any, *, accumulate: bool = False) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in rule.parameters() if p.requires_grad], 0.1,
                                momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        if accumulate and rule._processes is not None:
            with rule._processes.parallel.no_sync():
                rule(x, y)
        elif accumulate:
            rule(x, y)
        rule(x, y)
        optimizer.step()
    return {name: p.detach().clone() for name, p in rule.named_parameters()}


def outcomes() -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the weights after three steps of every way, and what is said where it is refused."""
    found, said = {}, {}
    for name, (rule, arguments) in WAYS.items():
        try:
            found[name] = trained(build(rule, arguments), *batch(rule))
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
    found["MonoForward, accumulated"] = trained(build("rules.MonoForward", {}),
                                                *batch("rules.MonoForward"), accumulate=True)
    return found, said


def refusals() -> dict[str, str]:
    """Return what is said where a rule, or a network that was cut up, is wrapped."""
    def sharded() -> nn.Module:
        network = ordinary_network()
        fully_shard(network)
        return network

    def after_the_rule() -> Tensor:
        network = ordinary_network()
        rule = MonoForward(network)
        fully_shard(network)
        loss: Tensor = rule(X.float(), Y)
        return loss

    cases = {"DDP of a rule": lambda: DistributedDataParallel(MonoForward(ordinary_network())),
             "shards of a rule": lambda: fully_shard(MonoForward(ordinary_network())),
             "rule of shards": lambda: MonoForward(sharded()),
             "rule, then shards": after_the_rule,
             "sizes unknown": lambda: MonoForward(DistributedDataParallel(nn.Sequential(
                 nn.Linear(20, 8), nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 1, 1), nn.Flatten(),
                 nn.Linear(8, 3))))(X.float(), Y)}
    said = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            said[name] = str(error)
    return said


def of_shards(*, whole: bool = False) -> dict[str, Tensor]:
    """Return what Backprop makes of a network that is cut up, or is `whole`."""
    torch.manual_seed(0)
    network = ordinary_network().double()
    for part in () if whole else (network[2], network):
        fully_shard(part)
    rule = Backprop(network)
    optimizer = torch.optim.SGD(rule.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        rule(*batch("rules.Backprop"))
        optimizer.step()
    return {name: (p if whole else p.full_tensor()).detach()
            for name, p in network.named_parameters()}


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    found, said = outcomes()
    torch.save({"found": found, "said": said, "refusals": refusals(), "shards": of_shards()},
               Path(sys.argv[1]) / f"{rank()}.pt")
    distributed.destroy_process_group()
