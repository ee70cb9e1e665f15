import io

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import BrokenReshape, NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import changes, decided, prune_sublayers, reshape
from netwright.reshape._calibration import batches_of
from netwright.reshape.change import named

X = torch.zeros(1, 8, dtype=torch.long)


@reshape
def narrow(model: nn.Module, example: torch.Tensor, width: int = 2, *,
           make: object = None) -> nn.Module:
    if width < 1:
        raise NothingToReshape("no width")
    return decided({"width": width}, weight=torch.full((width, 4), 3.0))


@narrow.applies
def narrowed(model, decision, weight=None):
    model[0] = nn.Linear(4, decision["width"])
    if weight is not None:
        model[0].weight.data = weight
    return model


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8))


def test_what_was_done_is_recorded_with_its_arguments_and_the_model_is_left():
    model, x = chain(), torch.randn(2, 4)
    changed = narrow(model, x, 3, make=nn.Tanh, check=False)  # which makes fewer outputs
    (record,) = nw.changes(changed)
    assert record.arguments == {"width": 3, "make": {"name": "torch.nn.Tanh"}}
    assert record.decision == {"width": 3}
    assert changed[0].weight.eq(3).all()
    assert model[0].out_features == 8
    assert nw.changes(model) == []


def test_a_decision_is_applied_to_the_model_that_is_given():
    model = chain()
    applied = narrow.apply(model, narrow.decide(model, None, width=3))
    assert applied is model
    assert model[0].weight.shape == (3, 4)
    assert not model[0].weight.eq(3).all()  # what the first call alone had
    assert [record.decision for record in changes(model)] == [{"width": 3}]


def test_records_add_up_and_go_with_copies_and_pickles():
    model = gpt(64, context=8, depth=4)
    once = prune_sublayers(model, X, 1)
    twice = prune_sublayers(once, X, remove=2)
    assert [record.arguments["remove"] for record in changes(twice)] == [1, 2]
    assert len(changes(once)) == 1
    file = io.BytesIO()
    torch.save(twice, file)
    file.seek(0)
    assert changes(torch.load(file, weights_only=False)) == changes(twice)


def test_a_failed_call_leaves_no_record():
    model = chain()
    with pytest.raises(NothingToReshape):
        narrow(model, None, width=0)
    assert changes(model) == []
    with pytest.raises(TypeError, match="width"):
        narrow(model, None, widths=1)


def test_decisions_are_plain_data():
    with pytest.raises(TypeError, match="decision must be plain data"):
        decided({"units": torch.arange(3)})
    with pytest.raises(TypeError, match="decision must be plain data"):
        decided({"share": float("nan")})


def test_reshapes_are_found_by_name():
    assert named("prune_sublayers") is prune_sublayers
    assert named(f"{__name__}.narrow") is narrow
    with pytest.raises(UnknownName, match="did you mean prune_sublayers"):
        named("prune_sublayer")


@pytest.mark.parametrize(("model", "error", "words"), [
    ("gpt2", TypeError, r"model must be a torch\.nn\.Module, got str 'gpt2'"),
    (nn.Linear(4, 2, device="meta"), ValueError, "on the meta device; load them first"),
    (torch.compile(nn.Linear(4, 2), backend="eager"), NothingToReshape, "compile the result"),
])
def test_what_is_no_model_to_change_is_refused(model, error, words):
    with pytest.raises(error, match=words):
        narrow(model, None)


@pytest.mark.parametrize("batches", [
    lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(
        X.repeat(4, 1), torch.zeros(4)), batch_size=2),
    lambda: iter([X.repeat(2, 1), X.repeat(2, 1)]), lambda: [(X.repeat(4, 1),)],
    lambda: {"x": X.repeat(4, 1)}, lambda: [{"x": X.repeat(4, 1), "labels": X}]])
def test_calibration_is_a_batch_or_any_iterable_of_batches(batches):
    model = gpt(64, context=8, depth=3)
    expected = prune_sublayers(model, X.repeat(4, 1), 2)
    if isinstance(batches(), (dict, list)):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return self.inner(x)

        removed = prune_sublayers(Named(), batches(), 2).removed_sublayers
        assert removed == tuple(f"inner.{name}" for name in expected.removed_sublayers)
    else:
        assert prune_sublayers(model, batches(), 2).removed_sublayers == expected.removed_sublayers


@pytest.mark.parametrize(("calibration", "error"), [
    ("text", TypeError), (3, TypeError), (None, ValueError), (iter([]), ValueError)])
def test_what_is_no_calibration_is_refused(calibration, error):
    with pytest.raises(error, match="calibration must"):
        prune_sublayers(gpt(64, context=8, depth=3), calibration, 2)
    with pytest.raises(ValueError, match=r"remove must be a whole number, got '2'"):
        prune_sublayers(gpt(64, context=8, depth=3), X, "2")


@nw.method("reshape", keeps_function=True)
@reshape
def spoilt(model: nn.Module, calibration: object, how: str) -> nn.Module:
    for _ in calibration if isinstance(calibration, list) else batches_of(calibration):
        pass
    return decided({"how": how}, keeps_function=how != "kept no more")


class Spoilt(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "fails" or (self.how == "fails in training" and self.training):
            raise RuntimeError("no such layer")
        return {"nan": x * float("nan"), "shape": x[:, :2], "moves": 1.01 * x,
                "kept no more": 1.01 * x}.get(self.how, x)


@spoilt.applies
def _spoil(model, decision):
    model.append(Spoilt(decision["how"]))
    return model


@pytest.mark.parametrize(("how", "words"), [
    ("fails", "does not run in eval mode on the example: RuntimeError: no such layer"),
    ("fails in training", "does not run in train mode on the example: RuntimeError: no such"),
    ("nan", "whose outputs in eval mode are nan or infinite"),
    ("shape", r"outputs in eval mode are of shape \[\(2, 2\)\] where the model's are \[\(2, 8\)\]"),
    ("moves", "keeps the function, but the outputs moved by 1.0e-02")])
@pytest.mark.parametrize("data", [
    lambda x: x, lambda x: [x, x], lambda x: iter([x, x]),
    lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), batch_size=3)],
    ids=["batch", "list", "iterator", "loader"])
def test_a_result_that_is_not_what_was_promised_is_not_returned(how, words, data):
    model, x = chain(), torch.randn(5, 4)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(BrokenReshape, match=f"spoilt .*{words}.*check=False"):
        spoilt(model, data(x), how)
    assert len(model) == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert model.training
    assert len(spoilt(model, data(x), how, check=False)) == 2


def test_what_a_call_does_not_keep_is_not_compared():
    model, x = chain(), torch.randn(5, 4)
    assert len(spoilt(model, x, "kept no more")) == 2
    with pytest.raises(ValueError, match="check must be True or False, got 'no'"):
        spoilt(model, x, "kept no more", check="no")


def test_a_network_that_does_not_train_by_itself_is_no_fault_of_the_reshape():
    model = nn.Sequential(nn.Linear(4, 8), Spoilt("fails in training"))
    assert len(spoilt(model, torch.randn(2, 4), "kept no more")) == 3


def test_running_the_result_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            self.seen += 1
            return x + 0 * torch.rand(())

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Counting())
    state = torch.get_rng_state()
    result = spoilt(model, torch.randn(5, 4, generator=torch.Generator()), "kept no more")
    assert torch.equal(torch.get_rng_state(), state)
    for network in (model, result):
        assert network[2].passes == network[2].seen == network[1].num_batches_tracked == 0
        assert network.training


def test_tokens_that_are_those_of_padding_are_read_when_generation_is_checked():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    for seed in range(8):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, pad_token_id=0))
        x = torch.zeros(2, 4, dtype=torch.long)
        swapped = nw.reshape.swap_feedforward(model, nw.blocks.GLU, x, progress=False)
        assert len(nw.changes(swapped)) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_is_checked_on_what_is_no_padding(side):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        num_local_experts=6, num_experts_per_tok=2)).eval()
    tokens, mask = torch.randint(50, (4, 8)), torch.ones(4, 8, dtype=torch.long)
    for fill in (0, 7, 23, 41):
        padding = torch.full((4, 40), fill)
        parts = [(tokens, mask), (padding, torch.zeros_like(padding))]
        parts = parts[::-1] if side == "left" else parts
        ids, held = (torch.cat(some, 1) for some in zip(*parts, strict=True))
        nw.reshape.prune_experts(model, {"input_ids": ids, "attention_mask": held}, 3)


def test_where_a_change_before_took_the_layers_the_reason_says_so():
    model = gpt(96, context=16)
    x = torch.zeros(1, 16, dtype=torch.long)
    adapted = nw.reshape.mix_lora(model, x, n_experts=2, rank=2)
    with pytest.raises(NothingToReshape, match="went through mix_lora, which puts other modules"):
        nw.reshape.moefy(adapted, x, n_experts=4)
