"""A mixture of experts beside the matrix products that its routed rows need, and its peers.

    python benchmarks/experts.py

8 SwiGLU experts, top-2, dim 512, hidden 1024, 4096 tokens. `products` is the bare work: for each
expert the three products of its rows, and for training the six of the backward pass, on rows that
lie in order. Ours runs on a list of `GLU`s and on `GLUExperts`, with the balance loss; the Mixtral
block of transformers has the same weights, and outputs and gradients are compared first.
st-moe-pytorch 0.1.8 and mixture-of-experts 0.2.3 are run as they come where they are installed: the
latter's experts are not gated, and both drop the tokens that an expert has no room for. Contenders
take turns; a figure is the median over the turns of the time over that of `products` in the same
turn, of the processor's time. Stored bytes are what autograd keeps besides parameters.
"""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from netwright.blocks.experts import GLUExperts, MixtureOfExperts
from netwright.blocks.feedforward import GLU
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "experts.json"
N, K, DIM, HIDDEN, TOKENS, TURNS = 8, 2, 512, 1024, 4096, int(os.environ.get("TURNS", "11"))
TRAINING, INFERENCE = 1.10, 1.08  # what is asked


class Products:
    """The matrix products of a SwiGLU for each expert's rows, and nothing else."""

    def __init__(self, bank: GLUExperts, counts: list[int]) -> None:
        self.weights = [p.detach() for p in (bank.gate, bank.up, bank.down)]
        self.counts = counts
        self.x = torch.randn(sum(counts), DIM)
        self.signal = torch.randn(sum(counts), DIM)
        self.hidden = torch.randn(sum(counts), HIDDEN)

    def forward(self) -> None:
        gate, up, down = self.weights
        for e, (x, h) in enumerate(zip(self.x.split(self.counts), self.hidden.split(self.counts),
                                       strict=True)):
            x @ gate[e].t(), x @ up[e].t(), h @ down[e].t()

    def step(self) -> None:
        self.forward()
        gate, up, down = self.weights
        for e, (x, h, s) in enumerate(zip(*(t.split(self.counts) for t in (
                self.x, self.hidden, self.signal)), strict=True)):
            s @ down[e], s.t() @ h, h @ gate[e], h.t() @ x, h @ up[e], h.t() @ x


def step(network: nn.Module, x: Tensor, signal: Tensor) -> None:
    network.zero_grad()
    y = network(x.requires_grad_())
    y = y[0] if isinstance(y, tuple) else y
    y.backward(signal)
    x.grad = None


def stored(network: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps besides parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = network(x)
    del y
    return sum(kept.values())


def peers() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from st_moe_pytorch import MoE as StMoE
            found["st-moe-pytorch"] = StMoE(dim=DIM, num_experts=N, gating_top_n=K,
                                            expert_hidden_mult=HIDDEN / DIM * 1.5)
        except ImportError as error:
            print("st-moe-pytorch is left out:", error)
        try:
            from mixture_of_experts import MoE
            found["mixture-of-experts"] = MoE(dim=DIM, num_experts=N, hidden_dim=HIDDEN)
        except ImportError as error:
            print("mixture-of-experts is left out:", error)
    return found


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, DIM)
    signal = torch.randn_like(x) / TOKENS
    bank = GLUExperts(DIM, HIDDEN, N)
    stacked = MixtureOfExperts(DIM, bank)
    apart = MixtureOfExperts(DIM, lambda: GLU(DIM, HIDDEN), n_experts=N)
    mixtral = MixtralSparseMoeBlock(MixtralConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=N, num_experts_per_tok=K))
    with torch.no_grad():
        for router in (apart.router, mixtral.gate):
            router.weight.copy_(stacked.router.weight)
        mixtral.experts.gate_up_proj.copy_(torch.cat([bank.gate, bank.up], 1))
        mixtral.experts.down_proj.copy_(bank.down)
        for e, expert in enumerate(apart.experts):
            for name in ("gate", "up", "down"):
                getattr(expert, name).weight.copy_(getattr(bank, name)[e])
    y = stacked(x)
    counts = stacked.usage.load.tolist()
    torch.testing.assert_close(y, mixtral(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, apart(x), rtol=1e-4, atol=1e-5)
    stacked.balance = apart.balance = (0.0,) * N
    for network in (stacked, apart, mixtral):
        step(network, x, signal)
    torch.testing.assert_close(bank.down.grad, mixtral.experts.down_proj.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stacked.router.weight.grad, mixtral.gate.weight.grad, rtol=1e-3,
                               atol=1e-5)
    stacked.balance = apart.balance = (0.01,) * N

    networks = {"netwright, GLUExperts": stacked, "netwright, list of GLU": apart,
                "transformers": mixtral, **peers()}
    products = Products(bank, counts)

    def infer(network: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                network(x.detach())
        return run
    found: dict[str, dict[str, float]] = {name: {} for name in ("products", *networks)}
    for what, work in (
            ("training", {"products": products.step, **{
                name: (lambda network=network: step(network, x, signal))
                for name, network in networks.items()}}),
            ("inference", {"products": products.forward, **{
                name: infer(network) for name, network in networks.items()}})):
        for network in networks.values():
            network.train(what == "training")
        times: dict[str, list[float]] = {name: [] for name in work}
        walls: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(TURNS + 1):
            for name, run in work.items():
                start, wall = time.process_time(), time.perf_counter()
                run()
                if turn:
                    times[name].append(time.process_time() - start)
                    walls[name].append(time.perf_counter() - wall)
        for name in work:
            found[name][f"{what} ms"] = 1000 * statistics.median(walls[name])
            found[name][f"{what} / products"] = statistics.median(
                a / b for a, b in zip(times[name], times["products"], strict=True))
    for name, network in networks.items():
        found[name]["stored MiB"] = stored(network.train(), x.detach()) / 2 ** 20
    for name, row in found.items():
        print(f"{name:24}", {key: round(value, 3) for key, value in row.items()}, flush=True)
    RESULTS.write_text(json.dumps({
        "experts": N, "k": K, "dim": DIM, "hidden": HIDDEN, "tokens": TOKENS, "turns": TURNS,
        "threads": torch.get_num_threads(), "asked": {"training": TRAINING, "inference": INFERENCE},
        "found": found, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    late = [(name, what) for name in list(networks)[:2]
            for what, most in (("training", TRAINING), ("inference", INFERENCE))
            if found[name][f"{what} / products"] > most]
    if late:
        raise SystemExit(f"slower than asked: {late}")


if __name__ == "__main__":
    main()
