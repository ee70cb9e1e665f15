import random
from collections import OrderedDict, deque

import numpy
import pytest
import torch
from torch import Tensor, nn

from netwright.runtime.attributes import Attributes
from netwright.runtime.modes import rehearsing
from netwright.runtime.passes import Pass


class Notes:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Remembers(nn.Module):
    """Holds state of every kind, and changes all of it in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.count, self.seen, self.cached = 0, [], None
        self.table, self.queue, self.kinds = OrderedDict(a=[1]), deque([1], maxlen=3), {1}
        self.array, self.plain = numpy.zeros(2), torch.zeros(2)
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = numpy.random.default_rng(1)
        self.old, self.python = numpy.random.RandomState(1), random.Random(1)
        self.notes, held = Notes(), [0]

        def counted() -> int:
            held[0] += 1
            return held[0]
        self.counted = counted

    def forward(self, x: Tensor) -> Tensor:
        factor = float(torch.rand((), generator=self.torch)) + self.numpy.random()
        factor += self.old.rand() + self.python.random() + random.random() + numpy.random.rand()
        factor += self.counted() + self.count + len(self.seen) + float(self.plain.sum())
        factor += float(self.array.sum()) + len(self.table["a"]) + self.queue[-1] + self.notes.count
        factor += len(self.kinds) + (self.cached is not None)
        self.count += 1
        self.seen.append(x.shape)
        self.cached, self.new = (x,), x
        self.table["a"].append(2)
        self.table["b"] = 3
        self.queue.append(2)
        self.kinds.add(2)
        self.array += 1
        self.plain += 1
        self.notes.count += 1
        return self.linear(x) * factor * torch.rand(())


@pytest.mark.parametrize("how", ["rehearsal", "pass"])
def test_everything_a_pass_changes_is_put_back(how: str) -> None:
    module, x = Remembers(), torch.ones(2, 3)
    this = Pass(module)
    first = module(x)
    if how == "pass":
        module(x)
        with this.again():
            assert torch.equal(module(x), first)
        with this.again():
            assert torch.equal(module(x), first)
        assert module.count == 2
        assert module.seen == [x.shape, x.shape]
        return
    before = Attributes([module])
    now = torch.get_rng_state()
    with rehearsing(module):
        module(x)
    assert not before.differ()
    assert torch.equal(torch.get_rng_state(), now)
    assert module.count == module.notes.count == 1
    assert module.table == OrderedDict(a=[1, 2], b=3)
    assert not torch.equal(module(x), first)  # or the above could not fail


def test_an_object_that_is_another_is_put_back_itself() -> None:
    module = Remembers()
    seen, before = module.seen, Attributes([module])
    module.seen, module.extra = [1], 2
    assert before.differ()
    before.put_back()
    assert module.seen is seen
    assert not hasattr(module, "extra")
