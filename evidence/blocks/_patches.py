"""What the experiments on token mixing share."""

from functools import lru_cache

import torch

from netwright.data import Split, digits


@lru_cache
def digit_patches() -> Split:
    """Return scikit-learn's digits, with mean 0 and deviation 1 over the training images."""
    split = digits()
    mean, deviation = torch.mean(split.x_train), torch.std(split.x_train)
    return Split((split.x_train - mean) / deviation, split.y_train,
                 (split.x_test - mean) / deviation, split.y_test)
