import json

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.advise.applicable import applicable
from netwright.advise.predict import Kernel, Kernels, Operand, Predicted, predict
from netwright.errors import NothingToReshape
from netwright.models import cnn, gpt, mlp
from tests.advise.test_inspect import NETWORKS, bert

X = torch.randn(4, 8)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return Kernels(tmp_path_factory.mktemp("kernels"))


def on_disk(model, folder):
    nw.save(model, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_bytes_and_operations_are_exact(name, kernels, tmp_path):
    make, example = NETWORKS[name]
    model = make().eval()
    found = predict(model, example, kernels=kernels)
    cost = nw.measure.cost(model, (example, None), repeats=1, warmup=0)
    assert (found.parameters, found.flops) == (cost.parameters, cost.flops)
    assert found.bytes == on_disk(model, tmp_path)
    assert 0 < found.seconds < 1
    assert found.unmeasured == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bytes_of_other_dtypes_buffers_and_ties_are_exact(dtype, kernels, tmp_path):
    model = cnn(3, (16, 16), 10).to(dtype).eval()
    model.register_buffer("scale", torch.ones(3, dtype=torch.int8))
    model.register_buffer("table", torch.ones(5), persistent=False)
    model[0].again = model[3].weight
    found = predict(model, torch.randn(1, 3, 16, 16, dtype=dtype), kernels=kernels)
    assert found.bytes == on_disk(model, tmp_path)


@pytest.mark.check
def test_bytes_of_every_reshape_are_exact(kernels, tmp_path):
    """Of each that can be done to one of these networks without more arguments."""
    networks = [(gpt(32, context=12).eval(), NETWORKS["gpt"][1]),
                (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), X)]
    seen = set()
    for model, example in networks:
        for change in applicable(model, example, kind="reshape"):
            name = change.method.name
            if name in seen:
                continue
            try:
                changed = nw.apply(name.partition(".")[2], model, example)
            except (ValueError, TypeError):
                continue  # it needs arguments that no general test can give
            seen.add(name)
            found = predict(changed, example, kernels=kernels)
            assert found.bytes == on_disk(changed, tmp_path / name), name
    assert len(seen) > 2


def test_a_recipe_is_predicted_on_a_copy(kernels):
    model, example = gpt(32, context=12), NETWORKS["gpt"][1]
    whole = predict(model, example, kernels=kernels)
    less = predict(model, example, recipe="prune_sublayers(remove=2)", kernels=kernels)
    share = less.share(whole)
    assert max(share.values()) < 1
    assert sum(p.numel() for p in model.parameters()) == whole.parameters
    with pytest.raises(NothingToReshape):
        predict(mlp(8, 3), X, recipe="prune_sublayers(remove=2)", kernels=kernels)


def test_the_network_does_not_run(kernels):
    class Counted(nn.Linear):
        def forward(self, x):
            numbers.append(type(x).__name__)
            return super().forward(x)

    numbers = []
    predict(Counted(8, 3), X, kernels=kernels)
    assert numbers == ["FakeTensor"]


def test_a_network_that_looks_at_numbers_is_run_once(kernels):
    class Choosing(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    found = predict(Choosing(8, 3), X.abs(), kernels=kernels)
    assert found.flops == 2 * 4 * 8 * 3


def test_an_operation_that_has_no_shapes_is_run_without_a_word(kernels, caplog):
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, vocab_size=32, num_local_experts=4)).eval()
    example = {"input_ids": NETWORKS["gpt"][1], "use_cache": False}
    found = predict(model, example, kernels=kernels)
    cost = nw.measure.cost(model, (example, None), repeats=1, warmup=0)
    assert found.flops == cost.flops
    assert not caplog.records


def test_packed_weights_are_measured_where_they_run(kernels):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ao.quantization.quantize_dynamic(mlp(8, 3).eval(), {nn.Linear})
    seen = predict_seconds(packed, kernels)
    assert seen > 0


def predict_seconds(model, kernels):
    from netwright.advise.predict import seen_in
    seconds, guessed = kernels.sum(seen_in(model, X))
    assert guessed == ()
    return seconds


def test_the_network_is_left_as_it_was(kernels):
    model = bert().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    predict(model, NETWORKS["bert"][1], kernels=kernels)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(type(b).__name__ == "FakeTensor" for b in model.buffers())


def test_a_kernel_is_measured_once_and_kept(tmp_path, monkeypatch):
    first = Kernels(tmp_path)
    predict(mlp(8, 3), X, kernels=first)
    monkeypatch.setattr(Kernel, "measure", lambda self: 1 / 0)
    again = Kernels(tmp_path)
    assert again.known == first.known
    assert predict(mlp(8, 3), X, kernels=again).unmeasured == ()


def test_tables_of_two_processes_are_joined(tmp_path):
    one, two = Kernels(tmp_path), Kernels(tmp_path)
    predict(mlp(8, 3), X, kernels=one)
    predict(cnn(3, (16, 16), 10), NETWORKS["cnn"][1], kernels=two)
    assert Kernels(tmp_path).known == one.known | two.known


def test_threads_have_tables_of_their_own(tmp_path):
    threads = torch.get_num_threads()
    one = Kernels(tmp_path).path
    torch.set_num_threads(threads + 1)
    try:
        assert Kernels(tmp_path).path != one
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": "b"}', ""])
def test_a_damaged_table_is_measured_anew(tmp_path, content):
    table = Kernels(tmp_path)
    table.path.write_text(content)
    found = Kernels(tmp_path)
    predict(mlp(8, 3), X, kernels=found)
    assert all(value > 0 for value in json.loads(found.path.read_text()).values())


def test_a_folder_that_may_not_be_written_costs_only_the_table(tmp_path):
    (tmp_path / "file").write_text("")
    assert predict(mlp(8, 3), X, kernels=Kernels(tmp_path / "file" / "below")).seconds > 0


def test_what_cannot_be_measured_is_guessed_and_named(tmp_path, monkeypatch):
    whole = Kernel.measure

    def measure(self):
        if "addmm" in self.text:
            raise RuntimeError
        return whole(self)

    monkeypatch.setattr(Kernel, "measure", measure)
    found = predict(mlp(8, 3), X, kernels=Kernels(tmp_path))
    assert found.unmeasured == ("aten.addmm.default",)
    assert found.seconds > 0


def test_more_work_takes_more_time(kernels):
    small, large = (predict(nn.Linear(n, n), torch.randn(64, n), kernels=kernels).seconds
                    for n in (64, 1024))
    assert large > 4 * small


def test_shares_are_of_the_same_resources():
    shares = Predicted(1, 10, 0, 2.0).share(Predicted(2, 40, 0, 4.0))
    assert shares == {"parameters": 0.5, "size": 0.25, "flops": 1.0, "inference_time": 0.5}


@pytest.mark.parametrize("tensor", [torch.randn(3, 4), torch.randn(3, 4).T, torch.ones(0, 2),
                                    torch.randn(2, 1).expand(2, 5), torch.tensor(3)])
def test_operands_are_made_as_they_were(tensor):
    made = Operand.of(tensor).make(4)
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
