import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.feedforward import GLU
from netwright.errors import NothingToReshape


@pytest.fixture
def model():
    return nw.models.gpt(12, 8, width=16, heads=2)


TOKENS = torch.zeros(2, 8, dtype=torch.long)


def test_the_network_is_changed_and_the_given_one_is_not(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = nw.apply("prune_sublayers(remove=1) + GLU(hidden=8)", model, TOKENS)
    blocks = [part for part in changed.modules() if isinstance(part, GLU)]
    assert {block.down.in_features for block in blocks} == {8}
    assert nw.changes(changed)[0].name == "prune_sublayers"
    assert changed(TOKENS).shape == (2, 8, 12)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reshape_looks_at_every_batch(model):
    seen = []

    def looking(network, calibration):
        seen.extend(calibration)
        return network
    nw.apply(looking, model, [TOKENS, TOKENS + 1])
    assert [int(batch[0, 0]) for batch in seen] == [0, 1]


def test_only_the_network_can_be_changed(model):
    with pytest.raises(ValueError, match="must change the network alone, got GLU"):
        nw.apply("GLU + MonoForward", model, TOKENS)
    with pytest.raises(ValueError, match="must hold at least one batch, got an empty list"):
        nw.apply("GLU", model, [])
    with pytest.raises(NothingToReshape, match="GLU cannot run on task 'model' because"):
        nw.apply("GLU", nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("recipe", ["GLU(hidden=8)", "AGLU", "Affine + AGLU",
                                    "RationalFeedForward"])
def test_the_result_is_saved_and_loaded(model, recipe, tmp_path):
    changed = nw.apply(recipe, model, TOKENS)
    nw.save(changed, tmp_path / "changed")
    again = nw.load(tmp_path / "changed", nw.models.gpt(12, 8, width=16, heads=2))
    assert torch.equal(again(TOKENS), changed(TOKENS))


@pytest.mark.parametrize("recipe", ["GLU", "AGLU", "Affine", "StructuredLinear(share=0.5)"])
def test_blocks_find_their_places_in_a_network_from_elsewhere(recipe):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, pad_token_id=0))
    changed = nw.apply(recipe, llama, TOKENS)
    name = recipe.partition("(")[0]
    assert sum(type(part).__name__ == name for part in changed.modules()) >= 2
    assert changed(TOKENS).logits.shape == (2, 8, 12)
