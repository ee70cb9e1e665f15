from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from netwright import checks
from netwright.errors import MissingExtra
from netwright.integrations.additions import check_can_be_driven
from netwright.objectives.losses import cross_entropy
from netwright.objectives.metrics import accuracy
from netwright.rules.batches import labels_apart
from netwright.rules.rule import Rule, checked
from netwright.runtime.distributed import average_gradients, share_buffers, share_weights

try:
    from lightning.pytorch import LightningModule

    _missing = ""
except ImportError as error:  # said when one is made
    LightningModule, _missing = nn.Module, str(error)  # type: ignore[assignment, misc]

__all__ = ["RuleModule"]


class RuleModule(LightningModule):
    """A rule as a module of Lightning, trained by its `Trainer` as any other.

    Logging, checkpoints, clipping, accumulation, bf16 and several processes are the `Trainer`'s;
    what the rule adds to its network is part of the checkpoint. A step of several batches, or of
    several processes, is that of one batch, by targets.

    It logs `train_loss`, and of validation and test data `val_loss` and `val_` with the metric's
    name. A batch is a pair (x, y), or a mapping that holds "labels".

    Args:
        rule: what stands in the place of `loss.backward()`.
        optimizer: a function of the parameters that returns one; by default Adam with a rate of
            0.001.
        scheduler: a function of the optimizer that returns one.
        scheduler_unit: when it is stepped, after each "epoch" or each "step".
        metric: a function of (predictions, y), averaged over batches by their targets, or an object
            of torchmetrics.

    Raises:
        MissingExtra: Lightning is not installed.
        ValueError: the rule changes the weights itself, or, once it is fitted, the trainer asks for
            float16, which needs scaled losses, or spreads the weights over processes.
    """

    def __init__(self, rule: Rule,
                 optimizer: Callable[[list[Parameter]], Optimizer] | None = None, *,
                 scheduler: Callable[[Optimizer], LRScheduler] | None = None,
                 scheduler_unit: Literal["epoch", "step"] = "epoch",
                 metric: Any = accuracy) -> None:
        if _missing:
            raise MissingExtra(f"RuleModule needs Lightning, which is not installed ({_missing}); "
                               "pip install 'netwright[lightning]'")
        check_can_be_driven(rule, "RuleModule")
        checks.one_of(["epoch", "step"], scheduler_unit=scheduler_unit)
        for name, value in (("optimizer", optimizer), ("scheduler", scheduler), ("metric", metric)):
            if not (callable(value) or (value is None and name != "metric")):
                raise ValueError(f"{name} must be a function, got {type(value).__name__}")
        super().__init__()
        self.rule, self.metric = rule, metric
        self._make = optimizer, scheduler, scheduler_unit
        self._counted = self._last = 0.0
        # All that DistributedDataParallel is shown: it sees passes through the whole module alone,
        # so that the rule's gradients are averaged here.
        self.anchor = nn.Parameter(torch.zeros(()))
        self._ddp_params_and_buffers_to_ignore = [
            f"rule.{name}" for name, _ in [*rule.named_parameters(), *rule.named_buffers()]]

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the scheduler where there is one."""
        make, schedule, unit = self._make
        parameters = self._learning()
        optimizer = torch.optim.Adam(parameters) if make is None else make(parameters)
        self.rule.stepped_by(optimizer)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule(optimizer), "interval": unit}}

    def on_fit_start(self) -> None:
        """Refuse what a rule cannot do, and give all processes the same weights."""
        if self.trainer.precision == "16-mixed":
            raise ValueError('precision must not be "16-mixed": float16 needs scaled losses, which '
                             'a rule\'s own update does not know; use "bf16-mixed"')
        strategy = type(self.trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"strategy must leave the weights whole in each process, got "
                             f'{strategy}; use strategy="ddp"')
        if self.trainer.world_size > 1:
            share_weights(self.rule)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Add a batch's update to `.grad`; return its loss."""
        x, y = self._pair(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.rule.zero_grad()
            self._counted = 0.0
        weight = _targets(y)
        if self._counted and weight and weight != self._last:
            self._scale(self._last / weight)  # so that .grad is always in units of one mean
        self._last = weight or self._last
        self._counted += weight
        loss = self.rule(x, y)
        self.log("train_loss", loss, prog_bar=True, batch_size=weight)
        return loss.detach() + 0 * self.anchor

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Do nothing: it is called between a rule's update and the step."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make `.grad` that of one batch of all that was seen since the last step."""
        if self._counted and self._last != self._counted:
            self._scale(self._last / self._counted)
        if self.trainer.world_size > 1:
            average_gradients(self._learning(), 0.0, self._counted, self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the metric of what the rule predicts."""
        self._judge(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss and the metric of what the rule predicts."""
        self._judge(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return what the rule predicts."""
        return self.rule.predict(self._pair(batch)[0])

    def on_validation_start(self) -> None:
        """Give all processes the same running statistics."""
        if self.trainer.world_size > 1:
            share_buffers(self.rule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the rule's generator stands."""
        if self.rule.generator is not None:
            checkpoint["rule_generator"] = self.rule.generator.get_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the rule's generator where it stood."""
        if self.rule.generator is not None and "rule_generator" in checkpoint:
            self.rule.generator.set_state(checkpoint["rule_generator"])

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            return labels_apart(self.rule.network, batch, None)
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError('a batch must be a pair (x, y), or a mapping that holds "labels", got '
                             f"{type(batch).__name__}; several inputs go into x as a tuple")
        return batch[0], batch[1]

    def _judge(self, batch: Any, stage: str) -> None:
        x, y = self._pair(batch)
        scores, weight = self.rule.predict(x), _targets(y)
        loss = getattr(self.rule, "loss", cross_entropy)
        several = self.trainer.world_size > 1
        self.log(f"{stage}_loss", checked(loss, scores, y), batch_size=weight, sync_dist=several)
        name = getattr(self.metric, "__name__", type(self.metric).__name__)
        if hasattr(self.metric, "compute"):  # an object of torchmetrics, which Lightning knows
            self.metric(scores, y)
            self.log(f"{stage}_{name}", self.metric)
        elif weight:
            self.log(f"{stage}_{name}", torch.as_tensor(self.metric(scores, y)), prog_bar=True,
                     batch_size=weight, sync_dist=several)

    def _learning(self) -> list[Parameter]:
        return [p for p in self.rule.parameters() if p.requires_grad]

    def _scale(self, factor: float) -> None:
        for p in self._learning():
            if p.grad is not None:
                p.grad.mul_(factor)


def _targets(y: Any) -> int:
    """Return how many targets count."""
    if not isinstance(y, Tensor):
        return 1
    return int((y != -100).sum()) if y.dtype == torch.int64 else len(y)
