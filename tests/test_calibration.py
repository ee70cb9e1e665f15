import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from netwright.calibration import stream, watched
from netwright.errors import CorruptCheckpoint, UnknownName
from netwright.models import gpt
from netwright.signals import apply
from tests.anatomy.models import built

ALL = ("gram", "mean", "absmax")


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 5, 3, padding="same"), nn.Flatten(), nn.Linear(80, 3))


def llama() -> nn.Module:
    return built("llama")[0]


def ids(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, length:] = 0
        found.append({"input_ids": torch.randint(64, (2, 7), generator=generator),
                      "attention_mask": mask})
    return found


NETWORKS = {
    "gpt": (lambda: gpt(16, context=8, depth=2), [torch.randint(16, (3, 8)) for _ in range(3)]),
    "conv": (conv, [torch.randn(2, 3, 8, 8) for _ in range(3)]),
    "llama": (llama, ids(7, 4, 5))}


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_hooks_on_the_whole_model(name) -> None:
    torch.manual_seed(0)
    make, batches = NETWORKS[name]
    model = make()
    seen = {}
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert stream(model, batches, lambda _, taken: seen.update(taken), statistics=ALL) is model
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    model.eval()
    with watched(model, [model], ALL) as (whole, padding), torch.no_grad():
        for x in batches:
            padding[:] = [x["attention_mask"].bool() if isinstance(x, dict) else None]
            apply(model, x)
    assert seen.keys() == whole.keys()
    for key, one in whole.items():
        assert one.rows == seen[key].rows
        for statistic in ALL:
            assert torch.equal(getattr(one, statistic), getattr(seen[key], statistic)), key


def test_padding_is_left_out() -> None:
    seen = {}
    stream(llama(), ids(7, 4, 5), lambda _, taken: seen.update(taken))
    assert {taken.rows for taken in seen.values()} == {3 * 7 + 7 + 4 + 5}


def test_a_gram_matrix_is_the_mean_of_outer_products() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [torch.randn(5, 4), torch.randn(2, 4)]
    seen = {}
    stream(model, batches, lambda _, taken: seen.update(taken), statistics=ALL)
    x = torch.cat(batches).double()
    assert torch.allclose(seen["0"].gram, x.T @ x / 7)
    assert torch.allclose(seen["0"].mean, x.mean(0))
    assert torch.equal(seen["0"].absmax.double(), x.abs().amax(0))
    assert seen["0"].gram.dtype == torch.float64
    assert seen["2"].gram.shape == (8, 8)


def test_patches_of_a_convolution_times_its_weight_are_its_output() -> None:
    model = conv()
    seen = {}
    x = torch.randn(2, 3, 8, 8)
    stream(model, [x], lambda _, taken: seen.update(taken), statistics=ALL)
    made = model[0](x).detach() - model[0].bias.detach()[:, None, None]
    mean = made.mean((0, 2, 3)).double()
    assert torch.allclose(model[0].weight.flatten(1).detach().double() @ seen["0"].mean, mean,
                          atol=1e-6)


def test_later_stages_see_what_was_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, seen = torch.randn(6, 4), {}

    def visit(stage, taken) -> None:
        seen.update(taken)
        if stage.name == "0":
            stage.modules[0].weight.data[2:] = 0
            stage.modules[0].bias.data[2:] = 0
    stream(model, [x], visit)
    gram = seen["2"].gram
    assert bool((gram[2:] == 0).all())
    h = model[:2](x).detach().double()
    assert torch.allclose(gram, h.T @ h / 6)


def test_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="batches must hold"):
        stream(model, [], print)
    with pytest.raises(UnknownName, match="did you mean gram"):
        stream(model, [torch.ones(2, 4)], print, statistics=["grams"])


# Weights on disk.

def saved_llama(folder, **options):
    model = llama()
    model.save_pretrained(folder, **options)
    return model


def halve(stage, taken):
    for module in stage.modules:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(0.5)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_weights_on_disk_become_what_they_would_in_memory(options, tmp_path) -> None:
    model = saved_llama(tmp_path, **options)
    expected = stream(llama(), ids(7, 4), halve)
    streamed = stream(llama(), ids(7, 4), halve, checkpoint=tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(streamed.state_dict()[name], tensor), name
    assert not list(tmp_path.glob("*.part"))
    assert torch.equal(streamed(**ids(7)[0]).logits, expected(**ids(7)[0]).logits)
    with torch.no_grad():  # what is changed afterwards stays in memory
        streamed.lm_head.weight.zero_()
    assert bool(type(model).from_pretrained(tmp_path).lm_head.weight.any())


def test_a_model_on_the_meta_device_is_filled_from_disk(tmp_path) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    seen, whole = {}, {}
    stream(empty, [torch.ones(2, 4)], lambda _, taken: seen.update(taken), checkpoint=tmp_path)
    stream(network, [torch.ones(2, 4)], lambda _, taken: whole.update(taken))
    assert torch.equal(seen["2"].gram, whole["2"].gram)
    with torch.device("meta"):
        normed = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    save_file(dict(network.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model must hold what checkpoint lacks"):
        stream(normed, [torch.ones(2, 4)], halve, checkpoint=tmp_path)


def test_what_breaks_off_leaves_the_old_weights(tmp_path) -> None:
    model = saved_llama(tmp_path)

    def fail(stage, taken):
        halve(stage, taken)
        if len(done) == 1:
            raise OSError("no space left on device")
        done.append(stage)

    done = []
    with pytest.raises(OSError, match="no space"):
        stream(llama(), ids(7), fail, checkpoint=tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())
    assert not list(tmp_path.glob("*.part"))


def test_other_checkpoints_are_refused(tmp_path) -> None:
    small = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        stream(small, [torch.ones(2, 4)], halve, checkpoint=tmp_path)
    path = tmp_path / "model.safetensors"
    for weights, message in (({"9.weight": torch.ones(2)}, "lacks"),
                             ({"0.weight": torch.ones(2, 2)}, "shape")):
        save_file(weights, path)
        with pytest.raises(ValueError, match=message):
            stream(small, [torch.ones(2, 4)], halve, checkpoint=tmp_path)
    save_file(small.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptCheckpoint, match="cut off"):
        stream(small, [torch.ones(2, 4)], halve, checkpoint=tmp_path)
    path.write_bytes(b"no header")
    with pytest.raises(CorruptCheckpoint):
        stream(small, [torch.ones(2, 4)], halve, checkpoint=tmp_path)
    save_file(small.state_dict(), path)

    def widen(stage, taken):
        for part in stage.modules:
            part.bias.data = torch.ones(1)

    with pytest.raises(ValueError, match="visit must leave"):
        stream(small, [torch.ones(2, 4)], widen, checkpoint=tmp_path)


MEMORY = """
import sys, torch
from torch import nn
from safetensors.torch import save_file
from netwright.calibration import stream

def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])

torch.set_num_threads(1)
depth, folder = int(sys.argv[1]), sys.argv[2]
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(depth)))
save_file({f"{i}.{k}": t for i in range(depth) for k, t in
           {"weight": torch.full((1024, 1024), 1e-3), "bias": torch.zeros(1024)}.items()},
          folder + "/model.safetensors")
before, most = anonymous(), 0

def visit(stage, taken):
    global most
    most = max(most, anonymous() - before)

stream(model, [torch.randn(64, 1024) for _ in range(4)], visit, checkpoint=folder)
print(most)
"""


@pytest.mark.check
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_memory_does_not_grow_with_depth(tmp_path) -> None:
    found = []
    for depth in (8, 32):
        folder = tmp_path / str(depth)
        folder.mkdir()
        run = subprocess.run([sys.executable, "-c", MEMORY, str(depth), str(folder)], text=True,
                             capture_output=True, check=True, env=os.environ | {
                                 "MALLOC_MMAP_THRESHOLD_": "65536"})
        found.append(int(run.stdout))
    assert found[1] < 1.05 * found[0] + 1024, found
    assert found[1] < 32 * 4 * 1024  # kilobytes of the weights
