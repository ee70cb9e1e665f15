import pytest

from netwright.errors import UnknownName
from netwright.evidence import deviation, every, figure, least, most
from netwright.evidence.claims import judged

FIGURES = {"ours": [3.0, 5.0], "theirs": [1.0, 5.0], "bytes": [10.0]}


@pytest.mark.parametrize(("claim", "holds"), [
    (figure("ours") > figure("theirs"), True),
    (figure("ours") > figure("theirs") + 1, False),
    (figure("ours") >= figure("theirs") + 1, True),
    (figure("theirs") < figure("ours"), True),
    (figure("ours") / figure("theirs") <= 1.25, False),
    (figure("ours") <= 2 * figure("theirs") - 2, True),
    (least("ours") > 2, True),
    (most("theirs") < 5, False),
    (deviation("ours") < deviation("theirs"), True),
    (every(figure("ours") >= figure("theirs")), True),
    (every(figure("ours") > figure("theirs")), False),
    (every(figure("bytes") > figure("ours")), True),
    ((figure("ours") > 3) & (figure("theirs") > 3), False),
    ((figure("ours") > 3) | (figure("theirs") > 3), True),
])
def test_a_claim_is_held_to_the_figures(claim, holds):
    verdict, (found,) = judged([claim], FIGURES)
    assert found["holds"] is holds
    assert verdict == ("shown" if holds else "not shown")


def test_a_claim_says_what_it_compared():
    _, (found,) = judged([figure("ours") > figure("theirs") + 1], FIGURES)
    assert found == {"claim": "ours > theirs + 1", "holds": False, "left": 4.0, "right": 4.0}
    _, (found,) = judged([every(figure("ours") > figure("bytes"))], FIGURES)
    assert found == {"claim": "in every seed, ours > bytes", "holds": False,
                     "left": [3.0, 5.0], "right": [10.0, 10.0]}
    _, (found,) = judged([(figure("ours") > 3) & (figure("theirs") > 3)], FIGURES)
    assert [part["holds"] for part in found["parts"]] == [True, False]


def test_some_claims_are_partly_shown_unless_others_are_asked_for():
    held, failed = figure("ours") > 3, figure("ours") > 30
    assert judged([held, failed], FIGURES)[0] == "partly shown"
    assert judged([held, failed], FIGURES, partly=failed)[0] == "not shown"
    assert judged([failed], FIGURES, partly=held)[0] == "partly shown"


def test_what_is_not_finite_holds_nothing():
    assert judged([figure("lost") > 0, figure("lost") <= 0], {"lost": [float("nan")]})[0] == \
        "not shown"


def test_mistakes_say_what_to_do():
    with pytest.raises(UnknownName, match="ours"):
        judged([figure("our") > 1], FIGURES)
    with pytest.raises(TypeError, match="&"):
        1 < figure("ours") < 2  # noqa: B015 - Python asks for the truth of the first comparison
    with pytest.raises(ValueError, match="as many seeds"):
        judged([every(figure("ours") > figure("more"))], {**FIGURES, "more": [1.0, 2.0, 3.0]})
