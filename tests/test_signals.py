from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from netwright.signals import apply, at, copied, found, mapped, moved, placed, tensors

Pair = namedtuple("Pair", ["a", "b"])


def nested():
    return {"x": (torch.zeros(1), [torch.zeros(2), "word"]), "pair": Pair(torch.zeros(3), 4),
            "foreign": UserDict(mask=torch.zeros(5))}


def test_tensors_are_found_at_any_depth_in_their_order():
    assert [len(t) for t in tensors(nested())] == [1, 2, 3, 5]
    assert tensors(torch.ones(2))[0].sum() == 2
    assert tensors(3) == tensors(None) == []


def test_what_is_mapped_keeps_its_kind():
    made = mapped(nested(), len)
    assert made == {"x": (1, [2, "word"]), "pair": Pair(3, 4), "foreign": {"mask": 5}}
    assert isinstance(made["pair"], Pair)
    assert isinstance(made["x"][1], list)


def test_where_nothing_changes_the_value_itself_comes_back():
    value = nested()
    assert mapped(value, lambda t: t) is value
    assert moved(value, torch.device("cpu")) is value
    assert moved(value, torch.device("meta"))["x"][0].device.type == "meta"


def test_a_copy_shares_nothing_and_has_no_graph():
    h = torch.ones(2, requires_grad=True) * 2
    holder = nn.Module()
    holder.kept = [h, h]
    made = copied((h, holder, {"h": h}))
    assert made[0] is made[1].kept[0] is made[1].kept[1] is made[2]["h"]
    assert made[0] is not h
    assert not made[0].requires_grad
    made[0].zero_()
    assert h.sum() == 4


def test_every_path_leads_to_its_tensor():
    value = nested()
    paths = dict(placed({k: value[k] for k in ("x", "pair")}))
    assert list(paths) == [("x", 0), ("x", 1, 0), ("pair", 0)]
    assert all(at(value, path) is tensor for path, tensor in paths.items())


def test_what_is_wanted_is_found_also_where_it_could_be_opened():
    value = nested()
    assert found(value, lambda v: isinstance(v, Pair)) == [value["pair"]]
    assert found(value, lambda v: v == "word" if isinstance(v, str) else False) == ["word"]


@pytest.mark.parametrize("x", [(2, 3), [2, 3], {"b": 3, "a": 2}, UserDict(a=2, b=3)])
def test_arguments_by_place_or_by_name(x):
    assert apply(lambda a, b: a - b, x) == -1
