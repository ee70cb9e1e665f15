"""Up to how many rows a kernel for packed weights is faster than the dense product."""

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from netwright.runtime.random_state import same_random_state

__all__: list[str] = []

SIZE, TRIED, TURNS = 1024, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 5


@cache
def packed_rows(dtype: torch.dtype) -> int:
    """Return it for codes of eight bits in `dtype`, 0 where the dense product always is.

    It is measured once on each machine and kept in the user's cache, so that another process
    takes the same path and so gives the same numbers.
    """
    try:
        path = _place(dtype)
        return int(path.read_text()) if path.exists() else _agreed(path, _measured(dtype))
    except (OSError, RuntimeError, ValueError):  # no home, or one that cannot be written in
        return _measured(dtype)


def _place(dtype: torch.dtype) -> Path:
    name = "-".join(["packed-rows", str(dtype), torch.__version__, platform.machine(),
                     torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())])
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "netwright" / name.replace(" ", "-")


def _agreed(path: Path, rows: int) -> int:
    """Write what was measured, unless another process did so first; return what stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{uuid4().hex}")
    own.write_text(str(rows))
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()
    return int(path.read_text())


@torch.no_grad()
def _measured(dtype: torch.dtype) -> int:
    with same_random_state():
        codes = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)
        scale = torch.rand(SIZE, 1).to(dtype)
        most = 0
        for rows in TRIED:
            x = torch.randn(rows, SIZE).to(dtype)

            def packed(x: Tensor = x) -> Tensor:
                return torch._weight_int8pack_mm(x, codes, scale[:, 0])

            def dense(x: Tensor = x) -> Tensor:
                return torch.nn.functional.linear(x, codes.to(dtype).mul_(scale))

            if _time(packed) > _time(dense):
                break
            most = rows
    return most


def _time(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
