import pytest
import torch

from netwright.data import CHARACTERS, characters, pydoc_text, tinyshakespeare
from netwright.errors import MissingData


def test_each_target_is_the_character_after():
    found = characters("abcdefghij" * 20, context=7, test=0.25)
    assert torch.equal(found.x_train.flatten()[1:], found.y_train.flatten()[:-1])
    assert torch.equal(found.x_test.flatten()[1:], found.y_test.flatten()[:-1])
    assert found.x_train.shape == (21, 7)
    assert found.x_test.shape == (7, 7)


def test_parts_do_not_overlap():
    found = characters("a" * 100 + "b" * 100, context=5, test=0.5)
    a, b = CHARACTERS.index("a"), CHARACTERS.index("b")
    assert found.x_train.unique().tolist() == found.y_train.unique().tolist() == [a]
    assert found.x_test.unique().tolist() == found.y_test.unique().tolist() == [b]


def test_unknown_characters_are_left_out():
    with_accents = characters("né\tx" * 40, context=4)
    without = characters("nx" * 40, context=4)
    assert torch.equal(with_accents.x_train, without.x_train)


def test_the_text_that_ships_with_python():
    text = pydoc_text()
    assert len(text) > 100_000
    assert text == pydoc_text()
    assert characters(text).x_train.max() < len(CHARACTERS) == 96


def test_shakespeare(tmp_path, monkeypatch):
    monkeypatch.delenv("NETWRIGHT_DATA", raising=False)
    with pytest.raises(MissingData, match="NETWRIGHT_DATA is not set"):
        tinyshakespeare()
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=r"tinyshakespeare.input\.txt does not exist"):
        tinyshakespeare()
    (tmp_path / "tinyshakespeare").mkdir()
    file = tmp_path / "tinyshakespeare" / "input.txt"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(MissingData, match="not UTF-8 text"):
        tinyshakespeare()
    file.write_text("To be", encoding="utf-8")
    assert tinyshakespeare() == "To be"


def test_too_short_a_text():
    with pytest.raises(ValueError, match="more than context=64 characters to each part, got 10"):
        characters("x" * 100)
