import pytest

from netwright.advise.question import Question, check_limits
from netwright.advise.wants import Want, seconds, shown, wanted
from netwright.errors import UnknownName


def test_limits_are_shares_or_absolute():
    assert wanted("size=0.5") == [Want("size", 0.5, share=True)]
    assert wanted({"size": "50%"}) == wanted("size=.5")
    assert wanted("size=40MB")[0].limit == 40e6
    assert wanted("size=40 MiB")[0].limit == 40 * 2**20
    assert wanted(["inference_time=5ms", "parameters=1000000"]) == [
        Want("inference_time", 0.005, share=False), Want("parameters", 1e6, share=False)]
    assert wanted("flops=2G")[0].limit == 2e9
    assert wanted(()) == []
    assert wanted(wanted("size=0.5")) == wanted("size=0.5")
    assert Want("size", 0.5, share=True).absolute(80.0) == 40.0


def test_an_unknown_resource_gets_the_nearest_names():
    with pytest.raises(UnknownName, match="did you mean inference_time"):
        wanted("inferencetime=0.5")


@pytest.mark.parametrize("given", [
    "size", "size=", "size=fast", "size=-1", "size=0", "size=nan", "size=inf", "size=40", "size=1",
    "size=4xB", "size=1.2.3", "inference_time=5MB", {"size": True}, {"size": None}, 3,
    {"size": [0.5]}])
def test_what_is_no_limit_is_refused(given):
    with pytest.raises(ValueError, match=r"want|resource"):
        wanted(given)


def test_two_limits_on_one_resource_contradict():
    with pytest.raises(ValueError, match=r"one limit for each resource.*size=0\.5.*size=0\.3"):
        wanted(["size=0.5", "size=0.3"])
    assert len(wanted(["size=0.5", "size=50%"])) == 1


@pytest.mark.parametrize("given", ["", "soon", "-5", "0", "10 parsecs", True, None, "nan", "1e999"])
def test_what_is_no_time_is_refused(given):
    with pytest.raises(ValueError, match="budget must be a time above 0"):
        seconds(given)


def test_times_and_figures_are_read_and_shown():
    assert (seconds("1h"), seconds("1.5m"), seconds(7)) == (3600.0, 90.0, 7.0)
    assert shown("size", 22_700_000) == "22.7 MB"
    assert shown("parameters", 22_700_000) == "22.7 M"
    assert shown("inference_time", 90.0) == "90 s"
    assert shown("size", 0.5, share=True) == "0.5"


ORIGINAL = {"size": 100.0, "inference_time": 2.0}


def test_a_limit_that_is_met_already_is_said():
    with pytest.raises(ValueError, match="size=200 B is met already: the model has 100 B"):
        check_limits(wanted("size=200B"), 0.9, ORIGINAL)
    with pytest.raises(ValueError, match="about training"):
        check_limits(wanted("training_memory=0.5"), 0.9, ORIGINAL)
    check_limits(wanted("size=50B"), 0.9, ORIGINAL)


def test_what_comes_nearer_comes_first():
    question = Question(tuple(wanted("size=0.5")), 0.98, ORIGINAL)
    meets, better = ({"size": 0.5}, 0.98), ({"size": 0.4}, 0.99)
    short, bad = ({"size": 0.6}, 1.0), ({"size": 0.1}, 0.5)
    ranked = sorted([bad, short, meets, better], key=lambda one: question.order(one[1], one[0]))
    assert ranked == [better, meets, short, bad]
    assert question.misses(0.97, {"size": 0.6}) == [
        {"resource": "size", "is": 0.6, "limit": 0.5},
        {"resource": "quality", "is": 0.97, "limit": 0.98}]
    assert not question.misses(0.98, {"size": 0.5})


def test_the_front_holds_what_nothing_beats():
    question = Question(tuple(wanted("size=0.5")), 0.9, ORIGINAL)
    assert question.front([(1.0, {"size": 1.0}), (0.9, {"size": 0.5}), (0.8, {"size": 0.5}),
                           (0.9, {"size": 0.5})]) == [True, True, False, True]
