from collections.abc import Callable

from torch import nn

from evidence.rules.local_losses import compared, one_size, working_bytes
from netwright.evidence import Outcome, Scale, evidence
from netwright.rules import Backprop, LocalLosses, MomentumAuxiliary, Rule


@evidence(paper="003-055", claim="Auxiliary networks that average the next block's weights are "
          "more accurate than plain local losses, at least as accurate as end-to-end training, and "
          "take less memory than that.")
def momentum_auxiliary(scale: Scale) -> Outcome:
    """Train one convolutional network end to end, by local losses and through moving averages."""
    seeds = 3 if scale == "desk" else 5
    plain, averaged = "local losses", "momentum auxiliary"
    rules: dict[str, Callable[[nn.Module], Rule]] = {
        "end to end": Backprop,
        plain: LocalLosses,
        averaged: MomentumAuxiliary,
        "momentum auxiliary, average held": lambda network: MomentumAuxiliary(network, momentum=1)}
    setting, found, working, curves = compared(rules, scale, seeds)
    mean = {name: sum(accuracies) / seeds for name, accuracies in found.items()}
    better, level = mean[averaged] > mean[plain], mean[averaged] >= mean["end to end"]
    level_bytes = {name: working_bytes(make, one_size(), (3, 16, 16))
                   for name, make in rules.items()}
    lean = [sizes[averaged] < sizes["end to end"] for sizes in (working, level_bytes)]
    moving = mean[averaged] > mean["momentum auxiliary, average held"]
    return Outcome(
        verdict=("shown" if better and level and moving and all(lean)
                 else "partly shown" if better or level or any(lean) else "not shown"),
        setting={**setting, "blocks": "one for each stage", "momentum": 0.995,
                 "network at one size": "13 convolutions of 16 channels, ReLU, one max-pooling to "
                 "4 x 4 cells, one linear layer, images of 16 x 16; measured, not trained"},
        figures={**{f"test accuracy, {name} (%)": values for name, values in found.items()},
                 **{f"working bytes of a step, {name}": [value]
                    for name, value in working.items()},
                 **{f"working bytes of a step, network at one size, {name}": [value]
                    for name, value in level_bytes.items()}},
        note="Shown means a mean accuracy above that of plain local losses, no lower than that of "
             "end-to-end training, above that of the same rule whose averages stay as they began "
             "(momentum 1: what the larger auxiliary network gives by itself), and less working "
             "memory than end to end, both in the network that was trained, of small maps, and "
             "in one whose maps keep their size. The paper trains ResNets for hundreds of epochs "
             "and adds a loss of reconstruction, which is left out here. No rule was tuned.",
        curves=curves, axes=("epoch", "test accuracy (%)"))
