from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import Parameter

from netwright.errors import MissingExtra
from netwright.integrations.additions import (
    check_can_be_driven,
    keep_additions,
    take_up_additions,
)
from netwright.objectives.losses import cross_entropy
from netwright.rules.batches import labels_apart
from netwright.rules.rule import Rule, checked
from netwright.runtime.distributed import share_weights

try:
    from transformers import Trainer

    _missing = ""
except ImportError as error:  # said when one is made
    Trainer, _missing = object, str(error)  # type: ignore[assignment, misc]

__all__ = ["RuleTrainer"]


class RuleTrainer(Trainer):
    """Hugging Face's `Trainer`, whose step is a rule's.

    What the rule adds to its network is optimised, clipped, saved beside it in
    `rule.safetensors`, and resumed. Steps of several batches and of several processes are those of
    one batch, by targets. All else is as in `Trainer`: schedules, callbacks, evaluation, bf16,
    `save_pretrained` of the network alone. With `Backprop` it trains as `Trainer` does.

    Labels are taken from a batch's "labels"; for a model that continues its input they are those
    of the next tokens. A rule that predicts by other means than the network's output is evaluated
    by those.

    Args:
        rule: what stands in the place of `loss.backward()`, built on the model.
        args: `TrainingArguments`.
        options: the other arguments of `Trainer`, by name.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: the rule changes the weights itself, or `args` ask for float16, which needs
            scaled losses, for weights that are spread over processes, or for smoothed labels.
    """

    def __init__(self, rule: Rule, args: Any = None, **options: Any) -> None:
        if _missing:
            raise MissingExtra(f"RuleTrainer needs transformers, which is not installed "
                               f"({_missing}); pip install 'netwright[hf]'")
        check_can_be_driven(rule, "RuleTrainer")
        _check_arguments(args, options)
        super().__init__(model=rule.network, args=args, **options)
        self.rule: Rule = rule.to(self.args.device)
        # Gradients are added up over processes here, once an update: the hooks of
        # DistributedDataParallel see passes through the whole network alone.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model,
                                                 evaluation_mode=True)
        self._ends_group = True

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer of all that the rule trains, where none was given."""
        optimizer: Any = super().create_optimizer(self.rule)
        self.rule.stepped_by(optimizer)
        return optimizer

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **options)
        if self._processes > 1:
            share_weights(self.rule)
        return prepared

    def training_step(self, model: nn.Module, inputs: dict[str, Any],
                      num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Add a batch's update to `.grad`; return the loss that it adds to the step's."""
        if self._ends_group:  # the loop clears the gradients of the network alone
            self.rule.zero_grad()
        self.rule.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        batch = self._prepare_inputs(inputs)
        share = self._share(batch, num_items_in_batch)
        with self.compute_loss_context_manager():
            loss = self._update(batch, share)
        self._ends_group = self.accelerator.sync_gradients
        if self._ends_group and self._processes > 1:
            self._add_up()
        # The loop averages what the processes tell.
        return (loss * share * self._processes).detach()

    def _share(self, batch: Mapping[str, Any], items: Tensor | int | None) -> Any:
        """Return how much of the step a batch is: its targets among all of them."""
        if self.current_gradient_accumulation_steps == 1 and self._processes == 1:
            return 1.0
        own = self._targets(batch)
        if own is None or items is None:
            return 1 / (self.current_gradient_accumulation_steps * self._processes)
        return own / items

    def _targets(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return how many targets of a batch count, None where it has none that can be counted."""
        _, y = labels_apart(self.rule.network, batch, None)
        return y.ne(-100).sum() if isinstance(y, Tensor) else None

    def _update(self, batch: Mapping[str, Any], share: Any) -> Tensor:
        """Add a rule's update, times a share, to `.grad`; return the loss."""
        if isinstance(share, float) and share == 1:
            return self.rule(batch, None)
        before = [(p, p.grad) for p in self._learning()]
        for p, _ in before:
            p.grad = None
        loss = self.rule(batch, None)
        for p, gradient in before:
            if p.grad is not None:
                p.grad.mul_(share)
            if gradient is not None:
                p.grad = gradient if p.grad is None else gradient.add_(p.grad)
        return loss

    def _add_up(self) -> None:
        """Add the processes' gradients up; each already counts by its targets."""
        for p in self._learning():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            distributed.all_reduce(p.grad)

    def _learning(self) -> list[Parameter]:
        return [p for p in self.rule.parameters() if p.requires_grad]

    @property
    def _processes(self) -> int:
        return int(self.accelerator.num_processes)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Return how many targets the batches of a step have in all processes."""
        counts = [self._targets(batch) for batch in batch_samples]
        if not counts or any(count is None for count in counts):
            return None
        total = torch.stack([count for count in counts if count is not None]).sum().to(device)
        return self.accelerator.gather(total).sum() if self._processes > 1 else total

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self.rule)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self.rule, grad_norm=grad_norm)

    # Evaluation

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any],
                        prediction_loss_only: bool, ignore_keys: list[str] | None = None) -> Any:
        """Return (loss, predictions, labels) of a batch, as the rule predicts."""
        loss = getattr(self.rule, "loss", cross_entropy)
        if type(self.rule).predict is Rule.predict and loss is cross_entropy:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self._prepare_inputs(inputs)
        x, y = labels_apart(self.rule.network, batch, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.rule.predict(x)
            found = None if y is None else checked(loss, scores, y).detach()
        return (found, None, None) if prediction_loss_only else (found, scores,
                                                                 batch.get("labels"))

    # What is kept

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            keep_additions(self.rule, Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str,
                              model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        take_up_additions(self.rule, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        take_up_additions(self.rule, Path(str(self.state.best_model_checkpoint)))


def _check_arguments(args: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError where a training asks for what a rule cannot do."""
    if options.get("model") is not None or options.get("model_init") is not None:
        raise ValueError("model and model_init must be left out, since the rule holds the model; "
                         "build the rule on it")
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func must be left out, since the rule has the loss; give "
                         "the rule loss=")
    if args is None:
        return
    if args.fp16:
        raise ValueError("args.fp16 must be False: float16 needs scaled losses, which a rule's own "
                         "update does not know; use bf16=True")
    if args.fsdp or args.deepspeed:
        raise ValueError("args must not spread the weights by fsdp or deepspeed, whose gradients a "
                         "rule does not fill; train in several processes without them")
    if args.label_smoothing_factor:
        raise ValueError("args.label_smoothing_factor must be 0, since the rule has the loss; give "
                         "the rule loss=nn.CrossEntropyLoss(label_smoothing=...)")
