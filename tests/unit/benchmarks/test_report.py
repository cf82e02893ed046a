from benchmarks import table
from benchmarks.harness import machine, promises, report
from benchmarks.harness.running import Answer


def answer(subject: str, **samples: list[float]) -> Answer:
    return Answer(subject, samples, ("pinned",), {"python": "3", subject: "1.0"}, 1.0, ())


def document(*rounds: list[Answer], **changes: object) -> dict:
    run = report.Run(machine.describe(), "2026-01-01T00:00:00+00:00", quick=False, load_start=0.1)
    run.rounds = list(rounds)
    for name, value in changes.items():
        setattr(run, name, value)
    cells = report.summaries(run.rounds)
    return report.to_json(run, cells, [promises.judge(promise, cells) for promise in promises.load()])


def test_samples_of_all_rounds_are_pooled_and_each_round_keeps_its_median():
    cells = report.summaries([[answer("hot", call_us=[1.0, 2.0, 3.0])], [answer("hot", call_us=[7.0])]])
    assert (cells["hot.call_us"].count, cells["hot.call_us"].rounds) == (4, (2.0, 7.0))


def test_a_met_and_a_missed_promise_are_told_apart_in_the_text():
    text = report.to_text(document([answer("hot", call_us=[6.0]), answer("warm", call_us=[50.0])]))
    assert "✗  hot no-op Python call, same node, 1 B" in text
    assert "2.00× the bound" in text
    assert "✓  warm call (executor asleep)" in text


def test_promises_for_later_and_failures_and_litter_are_never_hidden():
    leaky = Answer("ray", {"actor_noop_us": [1.0]}, (), {}, 1.0, ("process raylet",))
    text = report.to_text(document([leaky], failures={"dask": "dask: no answer within 9 s"}))
    assert "measured by `make bench-slurm`" in text
    assert "FAILED dask: no answer within 9 s" in text
    assert "left behind by ray: process raylet" in text


def test_a_busy_machine_is_said_to_be_not_quiet():
    assert "NOT QUIET" in report.to_text(document(load_start=2.0))
    assert "NOT QUIET" in report.to_text(document(busy_cores=[0.0, 1.2]))
    assert "NOT QUIET" not in report.to_text(document())


def test_the_table_shows_what_was_measured_with_its_ratio_and_its_machine():
    measured = document([answer("hot", call_us=[2.0]), answer("ray", actor_noop_us=[800.0])])
    text = table.render(measured)
    assert "| Ray actor | 800 / 800 | 400 |" in text
    assert "Dask" not in text
    assert measured["machine"]["line"] in text
    assert "ray 1.0" in text


def test_numbers_have_three_significant_digits():
    assert [report.number(value) for value in (0, 0.0123456, 2.628, 99.96, 953.4, 312_345)] == [
        "0", "0.0123", "2.63", "100", "953", "312,000",
    ]  # fmt: skip
