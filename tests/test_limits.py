import pytest

from dic_repa.errors import UserError
from dic_repa.limits import ENVIRONMENT, LIMITS, check_limit, lift_limits, limit


@pytest.fixture(autouse=True)
def no_limits_lifted(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "")


def test_a_value_over_the_limit_is_refused_with_the_option_that_lifts_it():
    check_limit("workers", LIMITS["workers"], "train.workers")
    with pytest.raises(UserError, match=r"train.workers is 10,000, over the limit of 256; .*--limit workers=10000 "):
        check_limit("workers", 10_000, "train.workers")


@pytest.mark.parametrize(("value", "number"), [("512", 512), ("5k", 5000), ("2G", 2 * 10**9), ("none", float("inf"))])
def test_an_option_lifts_a_limit(value, number):
    lift_limits([f"workers={value}"])
    assert limit("workers") == number
    check_limit("workers", 512, "train.workers")


@pytest.mark.parametrize("value", [10**20, 10**400, 1e300, float("inf")])
def test_a_huge_value_is_refused_in_a_short_line(value):
    with pytest.raises(UserError) as caught:
        check_limit("workers", value, "train.workers")
    assert len(str(caught.value)) < 200
    assert "--limit workers=none" in str(caught.value)


@pytest.mark.parametrize("word", ["worker=3", "workers", "workers=", "workers=-1", "workers=²", "workers=" + "9" * 99])
def test_a_wrong_limit_is_one_line(word):
    with pytest.raises(UserError, match="limit"):
        lift_limits([word])
