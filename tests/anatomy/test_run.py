import torch
from torch import nn
from torch.nn import functional

from netwright.anatomy.products import products
from netwright.anatomy.run import record


class Steps(nn.Module):
    """Calls a function of its own on a layer's output."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.layer, self.function = layer or nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


def recorded(function, x=None):
    return record(Steps(function), torch.randn(3, 4) if x is None else x)


def names(run):
    return [operation.name for operation in run.operations]


def test_operations_are_in_their_order_with_the_module_that_ran_them():
    run = recorded(lambda h: h.relu() + 1)
    assert names(run) == ["t", "addmm", "relu", "add"]
    assert [operation.call.name for operation in run.operations] == ["layer", "layer", "", ""]
    assert run.operations[-1].gave == (run.output,) == run.outputs
    assert set(run.parameters.values()) == {"layer.weight", "layer.bias"}


def test_what_is_changed_in_place_is_another_tensor_from_then_on():
    run = recorded(lambda h: h.relu_() + h)
    relu, add = run.operations[2:]
    assert relu.name == "relu"
    assert relu.gave != relu.taken
    assert add.taken == relu.gave * 2


def test_a_change_through_a_view_shows_in_what_it_looks_at():
    def change(h):
        part = h[:, 1:3]
        part.mul_(2)
        return h * 1
    run = recorded(change)
    scaled = next(o for o in run.operations if o.name == "mul")
    last = run.operations[-1]
    assert run.reaches(last.gave[0], scaled.gave[0])


def test_an_earlier_value_does_not_depend_on_a_later_change():
    def change(h):
        before = h.exp()
        h.zero_()
        return before
    run = recorded(change)
    zeroed = next(o for o in run.operations if o.name == "zero")
    assert zeroed.gave[0] not in run.ancestors(run.output)


def test_views_of_the_whole_keep_their_number():
    run = recorded(lambda h: h.detach().view(3, 4).relu())
    assert names(run)[2:] == ["relu"]


def test_what_depends_on_the_input_and_on_parameters():
    def mixed(h):
        return h + torch.arange(4.0)
    run = recorded(mixed)
    arange = next(o for o in run.operations if o.name == "arange").gave[0]
    assert not run.fed[arange]
    assert not run.taught[arange]
    weight = next(n for n, name in run.parameters.items() if name == "layer.weight")
    assert run.learned(weight)
    assert run.fed[run.output]
    assert run.taught[run.output]


def test_dropout_is_seen_although_it_does_nothing():
    run = recorded(lambda h: functional.dropout(h, 0.3, training=False))
    assert run.operations[-1].dropped == 0.3
    assert run.operations[-1].gave == (run.output,)


def test_elementwise_is_what_pytorch_marks_so():
    run = recorded(lambda h: functional.gelu(h).softmax(-1).sum(-1))
    assert [operation.elementwise for operation in run.operations[2:]] == [True, False, False]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_inside_functions_with_a_backward_of_their_own_is_seen():
    run = recorded(Doubled.apply)
    assert names(run)[-1] == "mul"
    assert run.reaches(run.output, run.operations[1].gave[0])


def test_a_fused_attention_layer_is_seen_in_parts():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    run = record(layer, torch.randn(2, 5, 8))
    assert [product.name for product in products(run)] == [
        "self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]


def test_products_have_their_sizes_and_their_bias():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
            self.mixing = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return self.mixing @ (x @ self.weight + self.bias)

    run = record(Written(), torch.randn(3, 4))
    first, second = products(run)
    assert (first.name, first.inputs, first.outputs) == ("weight", 4, 6)
    assert run.maker[first.gave].name == "add"
    assert (second.name, second.inputs, second.outputs) == ("mixing", 3, 5)


def test_a_product_of_activations_is_none_with_weights():
    run = recorded(lambda h: h @ h.T)
    assert [product.name for product in products(run)] == ["layer"]


def test_computed_weights_belong_to_the_module_that_applies_them():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    run = record(nn.Sequential(nn.Linear(4, 4), layer), torch.randn(3, 4))
    last = products(run)[-1]
    assert (last.name, last.weight, last.inputs, last.outputs) == ("1", None, 4, 2)
