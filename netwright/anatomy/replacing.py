"""Putting other modules in the place of a network's own, and the paths on which it runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_paths() -> Iterator[None]:
    """Hold PyTorch off the fused paths that skip a network's own modules.

    >>> with plain_paths():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    fused, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch._C._set_mkldnn_enabled(mkldnn)
