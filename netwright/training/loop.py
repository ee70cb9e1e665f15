from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from netwright import checks
from netwright.objectives.metrics import accuracy
from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import Rule
from netwright.stages import Stages
from netwright.training.arguments import (
    Metric,
    Options,
    check_data,
    check_functions,
    learning,
    made_folder,
    made_optimizer,
    made_scheduler,
    moved_to,
    rehearse,
)
from netwright.training.batches import Data
from netwright.training.history import Epoch, History
from netwright.training.own_loss import OwnLoss, has_own_loss
from netwright.training.run import Run
from netwright.training.unlabelled import Unlabelled, generative, mean_score

__all__ = ["fit"]


def fit(rule: Rule | nn.Module, train: Data, *, epochs: int,
        optimizer: Optimizer | Callable[[list[Parameter]], Optimizer] | None = None,
        validation: Data | None = None,
        metric: Metric = accuracy,
        higher_is_better: bool = True,
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        scheduler_unit: Literal["epoch", "step"] = "epoch",
        patience: int | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        on_epoch: Callable[[Epoch], object] | None = None,
        tensorboard: str | Path | None = None,
        progress: bool = True) -> History:
    """Train with `rule` on the batches of `train` and return what each epoch gave.

    With `checkpoint` the same call made again goes on where it stopped, and ends with the weights
    of a training that was never interrupted: on CPU bit for bit.

    A model that takes labels, as those of Hugging Face, is trained with its own loss. Any other
    rule is given the labels as y, and for a model that continues its input those of the next
    tokens.

    A generative model, which has `log_prob`, or declares its kind and has a `loss`, is trained on
    inputs without labels: a batch is x, or the tuple of what that method takes, and `metric` the
    mean of log p.

    Under `torchrun` every process trains on its own batches (`Batches` takes its share by
    itself), and gradients are averaged before each step.

    Args:
        rule: a rule, or a module to train by backpropagation.
        train: (x, y) that can be passed over again: a `Batches`, a `DataLoader`, a list; y may be
            several tensors where the loss is one's own. Mappings with "labels", as loaders of
            Hugging Face give them, do too.
        epochs: passes over `train`.
        optimizer: one, or a function of the parameters that returns one; by default Adam with a
            rate of 0.001.
        validation: batches like those of `train`, to judge each epoch by.
        metric: takes all predictions and targets of `validation`, or is an object with `update`,
            `compute` and `reset`.
        higher_is_better: whether more of `metric` is better.
        scheduler: one, or a function of the optimizer.
        scheduler_unit: when it is stepped, after each "epoch" or each "step".
        patience: epochs without a better one after which training stops and the best epoch's
            weights are put back.
        accumulate: batches that make one step, as one batch of all their samples would.
        clip: the most that the norm of the gradient may be.
        autocast: the type to compute in, `torch.bfloat16`.
        device: where to train; where the rule is without one.
        seed: of PyTorch, Python and numpy.
        checkpoint: a folder that the state of the training is kept in, after every epoch.
        checkpoint_every: steps after which it is kept as well.
        on_epoch: is called with what each epoch gave.
        tensorboard: a folder to log to.
        progress: whether a line shows how far it is.

    Raises:
        CorruptCheckpoint: the checkpoint is damaged, or another training's.
        Diverged: the loss or a weight is no longer finite.
        ValueError: an argument or a batch is not what it must be.

    >>> from netwright.data import Batches
    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> train = Batches(torch.randn(20, 4), torch.randint(3, (20,)), batch_size=8)
    >>> len(fit(network, train, epochs=2))
    2
    """
    rule = as_rule(rule)
    if metric is accuracy and not rule.needs_labels:
        metric = mean_score
    checks.count(1, epochs=epochs, accumulate=accumulate)
    checks.count(1, patience=patience, checkpoint_every=checkpoint_every, optional=True)
    checks.between(0, 2**63 - 1, whole=True, seed=seed, optional=True)
    checks.above(0, clip=clip, optional=True)
    check_functions(metric, on_epoch)
    check_data("train", train)
    if validation is not None:
        check_data("validation", validation)
    elif patience is not None:
        raise ValueError(f"patience={patience} needs validation= to see which epoch is the best")
    folder = made_folder("checkpoint", checkpoint)
    log = made_folder("tensorboard", tensorboard)
    if folder is None and checkpoint_every is not None:
        raise ValueError(f"checkpoint_every={checkpoint_every} needs checkpoint=, a folder")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast}; float16 needs "
                         "scaled losses, which a rule's own update does not know")
    if rule.updates_weights and (optimizer, scheduler, clip, accumulate) != (None, None, None, 1):
        raise ValueError(f"{type(rule).__name__} changes the weights itself; leave out optimizer, "
                         "scheduler, clip and accumulate")
    if not learning(rule):
        raise ValueError("rule has no parameter to train: every one has requires_grad=False, or "
                         "there is none")
    rehearse(rule, train, validation, metric)
    options = Options(epochs=epochs, metric=metric, higher_is_better=higher_is_better,
                       scheduler_unit=scheduler_unit, patience=patience, accumulate=accumulate,
                       clip=clip, autocast=autocast, seed=seed, folder=folder,
                       checkpoint_every=checkpoint_every, on_epoch=on_epoch,
                       tensorboard=log, progress=progress)
    with moved_to(rule, device):
        stepper = None if rule.updates_weights else made_optimizer(rule, optimizer, accumulate,
                                                                   clip)
        steps = made_scheduler(stepper, scheduler, validation is not None, options)
    return Run(rule, train, validation, stepper, steps, options).all()


def as_rule(given: Rule | nn.Module) -> Rule:
    """Return a rule, or the one by which a module is trained.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(given, Rule):
        return given
    if not isinstance(given, (nn.Module, Stages)):
        raise ValueError("rule must be a rule, or a module to train by backpropagation, got "
                         f"{type(given).__name__}; write nw.rules.Backprop(network)")
    network = given.model if isinstance(given, Stages) else given
    if generative(network):
        return Unlabelled(network)
    return OwnLoss(network) if has_own_loss(network) else Backprop(network)
