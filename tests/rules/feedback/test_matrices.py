import torch
from torch import nn

from netwright.rules.feedback.matrices import Matrices, draw


def test_learned_matrices_are_parameters_and_fixed_ones_are_buffers() -> None:
    for learned in (True, False):
        matrices = Matrices(learned=learned)
        matrices.add("encoder.layer.0", torch.ones(2, 3))
        assert len(list(matrices.parameters())) == learned
        assert len(list(matrices.buffers())) == (not learned)
        assert torch.equal(matrices["encoder.layer.0"], torch.ones(2, 3))


def test_names_that_differ_only_in_dots_stay_apart() -> None:
    matrices = Matrices(learned=False)
    matrices.add("a.b_c", torch.zeros(1))
    matrices.add("a_b.c", torch.ones(1))
    assert matrices["a.b_c"] == 0
    assert matrices["a_b.c"] == 1


def test_any_name_of_a_module_will_do() -> None:
    matrices = Matrices(learned=True)
    for name in ("", "float", "learned", "training"):
        matrices.add(name, torch.ones(1))
    assert list(matrices.state_dict()) == ["/", "/float", "/learned", "/training"]


def test_matrices_follow_their_owner_to_another_dtype() -> None:
    owner = nn.Module()
    owner.feedback = Matrices(learned=False)
    owner.feedback.add("0", torch.ones(2))
    assert owner.double().feedback["0"].dtype == torch.float64


def test_draw_has_the_deviation_that_was_asked_for_and_repeats_with_its_generator() -> None:
    like = torch.zeros(0, dtype=torch.float64)
    first, second = (draw((200, 300), 0.1, like, torch.Generator().manual_seed(3))
                     for _ in range(2))
    assert first.dtype == torch.float64
    assert torch.equal(first, second)
    assert abs(first.std() - 0.1) < 1e-3
    assert abs(first.mean()) < 2e-3
