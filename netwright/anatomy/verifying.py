"""Tries on a copy what was found of a network's units: permuted, scaled, removed."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from netwright.anatomy.replacing import plain_paths
from netwright.anatomy.run import meant
from netwright.anatomy.unit_groups import Sizes, UnitGroup, permute, remove, scale, silence
from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import apply, copied, mapped, tensors

_TOLERANCE = 1e-4  # some networks compute their norms in single precision whatever they are in
_MOST = 3  # attributes of which it is tried whether they are the size that changes


def run_of(network: nn.Module, example: Any) -> list[Tensor]:
    """Return the floating-point outputs of a network in eval mode, in double precision."""
    with evaluating(network), rehearsing(network), plain_paths():
        output = meant(apply(network, copied(example)))
    return [t.double() for t in tensors(output) if t.is_floating_point()]


def verified(network: nn.Module, example: Any, groups: Sequence[UnitGroup]
             ) -> tuple[list[UnitGroup], dict[tuple[str, str, str], bool]]:
    """Return the groups with what they can do as it was found by trying, and what are sizes."""
    trial = _Trial(network, example)
    groups = trial.permuted(list(groups))
    groups = trial.scaled(groups)
    return trial.removed(groups)


class _Trial:
    """A copy of a network whose weights are moved a little, so that none is zero by chance."""

    def __init__(self, network: nn.Module, example: Any) -> None:
        self.generator = Generator().manual_seed(0)
        self.network, self.example = _moved(network, example, self.generator)
        self.output = run_of(self.network, self.example)

    def same(self, change: Callable[[nn.Module], Any]) -> bool:
        """Return whether a changed copy computes the same."""
        changed = deepcopy(self.network)
        change(changed)
        return _close(run_of(changed, self.example), self.output)

    def permuted(self, groups: list[UnitGroup]) -> list[UnitGroup]:
        """Return the groups, those whose units do not change places without a trace marked."""
        orders = {group.name: self._order(group) for group in groups}

        def change(*chosen: UnitGroup) -> Callable[[nn.Module], None]:
            def all_of(network: nn.Module) -> None:
                for group in chosen:
                    permute(network, group, orders[group.name])
            return all_of
        if self.same(change(*groups)):
            return groups
        return [group if self.same(change(group)) else replace(
            group, permutable=False, removable=False, scalable=False,
            reason="the network computes something else when its units change places")
            for group in groups]

    def _order(self, group: UnitGroup) -> np.ndarray:
        return np.concatenate([
            block * group.per_block + torch.randperm(group.per_block,
                                                     generator=self.generator).numpy()
            for block in range(group.blocks)])

    def scaled(self, groups: list[UnitGroup]) -> list[UnitGroup]:
        """Return the groups, those that cannot be scaled after all marked."""
        factors = {group.name: np.exp(torch.randn(group.count, generator=self.generator,
                                                  dtype=torch.float64).numpy() / 2)
                   for group in groups}

        def change(*chosen: UnitGroup) -> Callable[[nn.Module], None]:
            def all_of(network: nn.Module) -> None:
                for group in chosen:
                    scale(network, group, factors[group.name])
            return all_of
        chosen = [group for group in groups if group.scalable]
        if not chosen or self.same(change(*chosen)):
            return groups
        return [group if not group.scalable or self.same(change(group))
                else replace(group, scalable=False) for group in groups]

    def removed(self, groups: list[UnitGroup]
                ) -> tuple[list[UnitGroup], dict[tuple[str, str, str], bool]]:
        """Return the groups, those that cannot be made smaller marked, and what are sizes."""
        sizes: dict[tuple[str, str, str], bool] = {}
        reasons: dict[str, str] = {}
        kinds: dict[str, str] = {}
        candidates = [group for group in groups if group.removable]
        for group in candidates:
            kind = re.sub(r"\d+", "0", group.name) + str((group.count, group.blocks))
            if kind not in kinds:
                kinds[kind] = self._removable([group], sizes)
            reasons[group.name] = kinds[kind]
        passing = [group for group in candidates if not reasons[group.name]]
        if len(passing) > len(set(kinds)) and any(
                self._tried(part, sizes) for part in (
                    [g for g in passing if not g.pooled], [g for g in passing if g.pooled])
                if part):
            for group in passing:
                reasons[group.name] = self._removable([group], sizes)
        return [replace(group, removable=False, reason=group.reason or reasons[group.name])
                if reasons.get(group.name) else group for group in groups], sizes

    def _removable(self, groups: list[UnitGroup], sizes: dict[tuple[str, str, str], bool]) -> str:
        """Return "" where units can be removed, having found which attributes are sizes."""
        first = self._tried(groups, sizes)
        if not first:
            return ""
        keys = {(groups[0].kind, *key) for key in self._unsure(groups, sizes)}
        unsure = sorted(keys - set(sizes))[:_MOST]
        for choice in sorted(product((False, True), repeat=len(unsure)), key=sum)[1:]:
            tried = {**sizes, **dict(zip(unsure, choice, strict=True))}
            if not self._tried(groups, tried):
                sizes.update({key: changed for key, changed in tried.items() if changed})
                return ""
        half = max(group.per_block for group in groups) // 2
        if half > 1 and not self._tried(groups, sizes, half):
            return ""
        return first

    def _unsure(self, groups: list[UnitGroup], sizes: Sizes) -> set[tuple[str, str]]:
        network = deepcopy(self.network)
        return remove(network, {g.name: g for g in groups}, _firsts(groups), sizes)

    def _tried(self, groups: list[UnitGroup], sizes: Sizes, less: int = 1) -> str:
        """Return what is wrong with a copy without units of each block, "" where nothing is."""
        smaller, silent = deepcopy(self.network), deepcopy(self.network)
        ids = _firsts(groups, less)
        try:
            remove(smaller, {group.name: group for group in groups}, ids, sizes)
            output = run_of(smaller, self.example)
        except Exception as error:  # whatever a network's own code says to a size it does not know
            return f"with fewer the network does not run: {str(error).splitlines()[0][:160]}"
        for group in groups:
            silence(silent, group, ids[group.name])
        if not all(torch.isfinite(t).all() for t in output):
            return "with fewer the outputs are not finite"
        if [t.shape for t in output] != [t.shape for t in self.output]:
            return "with fewer the outputs have another shape"
        if not any(g.pooled for g in groups) and not _close(output,
                                                            run_of(silent, self.example)):
            return "to remove a unit is something else than to silence it"
        return ""


def _firsts(groups: Sequence[UnitGroup], count: int = 1) -> Mapping[str, np.ndarray]:
    """Return the first units of each block of each group, all but one at most."""
    return {group.name: (np.arange(group.blocks)[:, None] * group.per_block
                         + np.arange(min(count, group.per_block - 1))).ravel()
            for group in groups}


def _moved(network: nn.Module, example: Any, generator: Generator) -> tuple[nn.Module, Any]:
    """Return a copy of a network with other weights, and its input, in double precision."""
    for wide, size in ((True, 0.3), (True, 0.0), (False, 0.0)):
        copy = deepcopy(network).requires_grad_(False)
        inputs = copied(example)
        with suppress(Exception):  # such as an operation that double precision has no kernel for
            if wide:
                copy = copy.double()
                inputs = mapped(inputs, lambda t: t.double() if t.is_floating_point() else t)
            _shake(copy, size, generator)
            if all(torch.isfinite(t).all() for t in run_of(copy, inputs)):
                return copy, inputs
    return deepcopy(network), example


@torch.no_grad()
def _shake(network: nn.Module, size: float, generator: Generator) -> None:
    """Move weights at random by a part of their spread, and buffers by a part of themselves."""
    if not size:
        return
    for p in network.parameters():
        if p.is_floating_point():
            spread = p.std() if p.numel() > 1 else p.abs().mean()
            p.data = p.data + (size * spread + 0.02) * _noise(p, generator)
    for b in network.buffers():
        if b.is_floating_point() and b.ndim == 1 and bool((b.abs() < 1e4).all()):
            b.data = b.data * (1 + size * _noise(b, generator).abs()) + 0.02


def _noise(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _close(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * (1e-3 + b.abs().max()))
        for a, b in zip(one, two, strict=True))
