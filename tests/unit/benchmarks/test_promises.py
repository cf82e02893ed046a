import pytest

from benchmarks.harness.promises import Promise, judge, load
from benchmarks.harness.samples import summarise

CELLS = {
    "hot.call_us": summarise("call_us", [[4.0]]),
    "floors.ucx_us": summarise("ucx_us", [[1.0]]),
    "ray.call_us": summarise("call_us", [[800.0]]),
}


def promise(**changes: object) -> Promise:
    return Promise(**{"id": "p", "text": "a call", "unit": "µs", "measure": "hot.call_us"} | changes)


def test_a_value_within_its_bound_is_met():
    verdict = judge(promise(at_most=4.0), CELLS)
    assert (verdict.outcome, verdict.value, verdict.shortfall) == ("met", 4.0, "")


def test_a_missed_upper_bound_says_by_what_factor():
    verdict = judge(promise(at_most=2.0), CELLS)
    assert (verdict.outcome, verdict.shortfall) == ("missed", "2.00× the bound")


def test_a_missed_lower_bound_says_what_part_of_it_was_reached():
    verdict = judge(promise(measure="ray.call_us", over="hot.call_us", at_least=400), CELLS)
    assert (verdict.outcome, verdict.value, verdict.shortfall) == ("missed", 200.0, "0.50 of the bound")


def test_a_floor_is_subtracted_before_the_bound_is_applied():
    assert judge(promise(minus="floors.ucx_us", at_most=3.0), CELLS).value == 3.0


@pytest.mark.parametrize("missing", ["measure", "minus", "over"])
def test_a_promise_is_unmeasured_when_any_of_its_cells_is_missing(missing):
    verdict = judge(promise(at_most=1.0, **{missing: "nobody.call_us"}), CELLS)
    assert (verdict.outcome, verdict.value) == ("unmeasured", None)


def test_a_promise_for_later_is_neither_met_nor_missed():
    verdict = judge(Promise(id="p", text="t", unit="ms", later="needs Slurm"), CELLS)
    assert verdict.outcome == "later"


@pytest.mark.parametrize("bounds", [{}, {"at_most": 1.0, "at_least": 1.0}, {"measure": "", "at_most": 1.0}])
def test_a_promise_without_exactly_one_bound_on_a_measure_is_refused(bounds):
    with pytest.raises(ValueError, match="needs `measure` and one of"):
        promise(**bounds)


def test_promises_with_the_same_id_are_refused(tmp_path):
    row = '[[promise]]\nid = "p"\ntext = "t"\nunit = "s"\nlater = "x"\n'
    (tmp_path / "promises.toml").write_text(row * 2)
    with pytest.raises(ValueError, match="same id"):
        load(tmp_path / "promises.toml")


def test_every_promise_of_the_design_is_measured_or_says_why_not():
    promises = load()
    assert len(promises) >= 15
    assert all(promise.later or promise.bound for promise in promises)
