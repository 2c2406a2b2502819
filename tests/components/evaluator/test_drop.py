"""How far below earlier models the noise of a test allows."""

import math

import pytest

from components.evaluator.drop import Measured, compare, standard_error


def measured(accuracy: float, version: str = "", data: str = "d", examples: int = 10_000):
    return Measured({"top": accuracy}, examples, data, version)


def texts(candidate: Measured, baseline: Measured, *pushed: Measured) -> list[tuple[bool, str]]:
    return [(item.refused, item.text) for item in compare(candidate, baseline, pushed, ["top"])]


def test_standard_error_is_that_of_counted_differences():
    # 0.5 and 0.5 of 10,000: each varies by 0.005, their difference by the root of two of it.
    assert standard_error(0.5, 0.5, 10_000) == pytest.approx(0.005 * math.sqrt(2))
    assert standard_error(0.0, 1.0, 10) == 0.0


def test_a_drop_within_one_standard_error_is_told_and_allowed():
    # sqrt((.8 * .2 + .8046 * .1954) / 10,000) is 0.00563.
    assert texts(measured(0.8), measured(0.8046)) == [
        (False, "top is 0.0046 below the baseline, within the test's noise of 0.0056")
    ]
    assert texts(measured(0.8), measured(0.8057)) == [
        (True, "top is 0.0057 below the baseline, more than the test's noise of 0.0056")
    ]
    assert texts(measured(0.8), measured(0.8)) == []
    assert texts(measured(0.81), measured(0.8)) == []


def test_the_same_drop_again_and_again_ends_at_two_standard_errors_of_the_best():
    best, pushed = measured(0.8, "1"), [measured(0.8, "1")]
    current = best
    for version in range(2, 10):
        candidate = measured(current.accuracies["top"] - 0.005)
        found = texts(candidate, current, *pushed)
        if any(refused for refused, _ in found):
            break
        current = measured(candidate.accuracies["top"], str(version))
        pushed.append(current)
    assert [version.version for version in pushed] == ["1", "2", "3"]
    assert found[-1] == (
        True,
        "top is 0.0150 below the best version in the folder, 1, more than 2 times the test's noise "
        "of 0.0057",
    )


@pytest.mark.parametrize("other", [{"data": "other"}, {"examples": 500}])
def test_versions_tested_on_other_data_do_not_count(other: dict[str, str]):
    assert texts(measured(0.5), measured(0.5), measured(0.9, "1", **other)) == []
    assert texts(measured(0.5), measured(0.5), measured(0.9, "1")) != []


@pytest.mark.parametrize(
    "damaged",
    [None, [], {}, {"accuracies": 1, "examples": 1, "data": ""}, {"accuracies": {}, "extra": 1},
     {"accuracies": {"top": 7}, "examples": 1, "data": ""}],
)  # fmt: skip
def test_what_is_no_measurement_is_passed_over(damaged: object):
    assert Measured.from_json(damaged) is None
