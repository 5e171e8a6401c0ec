"""Which difference is named, told from made-up records."""

import re
from collections.abc import Iterator

import pytest

from trainkit.testing.divergence import diagnose, differences
from trainkit.testing.step_trace import Record

Values = dict[tuple[str, str], str]

RESUMED_AT = 2


def step(iteration: int) -> Iterator[tuple[str, Values]]:
    yield (
        "forward",
        {
            ("data set Images", "sample 0; image; index 3"): f"pixels {iteration}",
            ("generators", "torch"): f"state {iteration}",
            ("layer stem", "its output"): f"features {iteration}",
            ("loss", "loss_cls"): f"{iteration}.5",
        },
    )
    yield "gradients", {("gradient", "weight"): f"#{iteration}"}
    yield "gradient norm", {("gradient norm", "it"): f"{iteration}"}


def state(iteration: int) -> Values:
    return {
        ("parameter", "weight"): f"weight {iteration}",
        ("buffer", "mean"): f"mean {iteration}",
        ("optimizer", "momentum of weight"): f"momentum {iteration}",
        ("state of hook Best", "best"): f"best {iteration}",
        ("hook Mine", "count"): f"{iteration + 1}",
        ("hook Mine", "since"): "0",
    }


def run(kills: bool = False, ranks: int = 1, iterations: int = 4) -> list[Record]:
    """A run of four iterations, cut after one of them, where a killed run goes on."""
    records = []
    for rank in range(ranks):
        records.append(Record(rank, 0, -1, "checkpoint", 0, state(-1)))
        for iteration in range(iterations):
            segment = int(kills and iteration > RESUMED_AT)
            for phase, values in step(iteration):
                records.append(Record(rank, segment, iteration, phase, 0, values))
            if iteration == RESUMED_AT:
                for cut in (0, 1) if kills else (0,):
                    records.append(Record(rank, cut, iteration, "checkpoint", 0, state(iteration)))
                    segment = cut
            records.append(Record(rank, segment, iteration, "end", 0, state(iteration)))
    metrics: Values = {("metrics.json", "total_loss"): "1.5"}
    return [*records, Record(0, 0, 3, "metrics.json", 0, metrics)]


def change(
    records: list[Record],
    component: str,
    item: str,
    since: tuple[int, str],
    value: str | None = "changed",
    until: int = 99,
    rank: int | None = None,
) -> list[Record]:
    """Changes one value from a moment on; in a killed run, of what comes after the resume."""
    phases = ["forward", "gradients", "gradient norm", "checkpoint", "end", "metrics.json"]
    begin = (since[0], phases.index(since[1]))
    resumes = any(record.segment for record in records)
    changed = []
    for record in records:
        moment = (record.iteration, phases.index(record.phase))
        is_later = begin <= moment and record.iteration <= until
        is_cut = resumes and record.segment == 0 and record.phase == "checkpoint"
        is_meant = (component, item) in record.values and rank in (None, record.rank)
        values = dict(record.values)
        if is_later and is_meant and not is_cut:
            values[component, item] = value or ""
            if value is None:
                del values[component, item]
        changed.append(record._replace(values=values))
    return changed


def never() -> list[Record]:
    raise AssertionError("there is no difference that another run could explain")


def test_equal_runs_are_exact_without_another_run() -> None:
    assert diagnose(run(ranks=2), run(True, ranks=2), never) == (True, [])


CULPRITS = {
    ("parameter", "weight", "checkpoint"): "parameter: `weight` is changed after the resume at "
    "iteration 2 and was weight 2 in the unbroken run: state not restored. Return it from",
    ("optimizer", "momentum of weight", "checkpoint"): "optimizer: `momentum of weight` is changed "
    "after the resume .* not restored. Return it from the optimizer's state_dict",
    ("state of hook Best", "best", "checkpoint"): "state of hook Best: `best` is changed .* not "
    "restored. The hook's load_state_dict must take back",
    ("data set Images", "sample 0; image; index 3", "forward"): "data set Images: sample 0 of "
    r"iteration 3 differs \(image; index 3; changed, .*although its index is the same",
    ("generators", "torch", "forward"): "generators: torch differs at iteration 3 .*seeded",
    ("layer stem", "its output", "forward"): "layer stem: its output differs at iteration 3 "
    r"\(changed, in .*although inputs, parameters and randomness are the same",
    ("loss", "loss_cls", "forward"): "loss: loss_cls differs at iteration 3 .*model's own forward",
    ("gradient", "weight", "gradients"): "gradient: weight differs at iteration 3, although all "
    "losses are the same",
    ("gradient norm", "it", "gradient norm"): "gradient norm: it differs at iteration 3 .*a hook's",
    ("parameter", "weight", "end"): "parameter: weight differs at iteration 3 .*the optimizer or a",
    ("metrics.json", "total_loss", "metrics.json"): "metrics.json: total_loss differs at iteration "
    "3 .*although all that was computed is the same",
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_differs_first_is_named_with_its_mend(culprit: tuple[str, str, str]) -> None:
    component, item, phase = culprit
    since = (RESUMED_AT if phase == "checkpoint" else 3, phase)
    killed = change(run(True), component, item, since)
    # What follows from it is not named.
    killed = change(killed, "metrics.json", "total_loss", (3, "metrics.json"))
    is_exact, lines = diagnose(run(), killed, lambda: run())
    assert not is_exact
    (line,) = lines
    assert re.match(CULPRITS[culprit], line), line


HOOK = "hook Mine: `count` is changed after the resume at iteration 2 and was 3 in the unbroken run"


def test_a_hook_that_forgot_comes_before_what_followed_from_it() -> None:
    killed = change(run(True), "hook Mine", "count", (2, "checkpoint"))
    killed = change(killed, "gradient norm", "it", (3, "gradient norm"))
    is_exact, (cause, effect) = diagnose(run(), killed, run)
    assert not is_exact
    assert cause.startswith(HOOK)
    assert "Return it from the hook's state_dict" in cause
    assert effect.startswith("gradient norm: it differs at iteration 3")


def test_a_forgotten_attribute_without_consequences_is_worth_a_look() -> None:
    killed = change(run(True), "hook Mine", "count", (2, "checkpoint"))
    is_exact, (line,) = diagnose(run(), killed, run)
    assert is_exact
    assert line.startswith(f"Nothing that was compared depends on it, but {HOOK}")


def test_an_attribute_that_mends_itself_is_not_told() -> None:
    killed = change(run(True), "hook Mine", "count", (2, "checkpoint"), until=2)
    assert diagnose(run(), killed, run) == (True, [])


def test_a_time_is_no_difference() -> None:
    def timed(kills: bool, time: str) -> list[Record]:
        records = change(run(kills), "hook Mine", "since", (-1, "checkpoint"), time)
        records = change(records, "state of hook Best", "best", (0, "end"), time)
        return change(records, "metrics.json", "total_loss", (3, "metrics.json"), time)

    is_exact, lines = diagnose(timed(False, "1"), timed(True, "2"), lambda: timed(False, "3"))
    assert is_exact
    assert lines == [
        "Not compared, as it varies without a kill: metrics.json `total_loss`",
        "Not compared, as it varies without a kill: state of hook Best `best`",
    ]


def test_chance_is_told_from_state_that_was_lost() -> None:
    killed = change(run(True), "layer stem", "its output", (1, "forward"), "x")
    again = change(run(), "layer stem", "its output", (1, "forward"), "y")
    is_exact, (line,) = diagnose(run(), killed, lambda: again)
    assert not is_exact
    assert line.startswith("Not deterministic even without a kill: layer stem: its output differs")


def test_lost_state_is_named_in_a_run_of_chance_too() -> None:
    killed = change(run(True), "optimizer", "momentum of weight", (2, "checkpoint"))
    again = change(run(), "layer stem", "its output", (3, "forward"))
    is_exact, (line,) = diagnose(run(), killed, lambda: again)
    assert not is_exact
    assert line.startswith("optimizer: `momentum of weight` is changed after the resume")


def test_a_start_that_the_seed_does_not_decide_is_named() -> None:
    other = change(run(), "parameter", "weight", (-1, "checkpoint"))
    _, (line,) = diagnose(run(), other, lambda: other)
    assert re.search("weight differs at iteration -1 .*does not follow from SEED", line)


def test_an_iteration_that_was_not_done_is_named() -> None:
    _, (line,) = diagnose(run(), run(True, iterations=3), run)
    assert line == "the run did not come to iteration 3, forward."
    _, (line,) = diagnose(run(iterations=3), run(True), lambda: run(iterations=3))
    assert line == "the run came, unlike the unbroken one, to iteration 3, forward."


def test_a_value_that_is_gone_is_missing() -> None:
    killed = change(run(True), "optimizer", "momentum of weight", (2, "checkpoint"), None)
    _, (line,) = diagnose(run(), killed, run)
    assert "is missing after the resume at iteration 2 and was momentum 2" in line


def test_the_rank_is_named_and_causes_on_one_rank_precede_effects_on_another() -> None:
    killed = change(run(True, 2), "layer stem", "its output", (3, "forward"), rank=1)
    killed = change(killed, "gradient", "weight", (3, "gradients"))
    _, (line,) = diagnose(run(ranks=2), killed, lambda: run(ranks=2))
    assert line.startswith("layer stem: its output differs at iteration 3 on rank 1")


def test_the_buffers_of_other_ranks_are_not_restored_and_not_compared() -> None:
    killed = change(run(True, 2), "buffer", "mean", (2, "checkpoint"), rank=1)
    assert diagnose(run(ranks=2), killed, never) == (True, [])
    killed = change(run(True, 2), "buffer", "mean", (2, "checkpoint"), rank=0)
    _, (line,) = diagnose(run(ranks=2), killed, lambda: run(ranks=2))
    assert line.startswith("buffer: `mean` is changed after the resume")


def test_all_differences_come_in_causal_order() -> None:
    killed = change(run(True, 2), "parameter", "weight", (2, "checkpoint"))
    killed = change(killed, "layer stem", "its output", (3, "forward"))
    found = differences(run(ranks=2), killed)
    assert [(d.iteration, d.phase, d.rank, d.segment) for d in found] == [
        (2, "checkpoint", 0, 1),
        (2, "checkpoint", 1, 1),
        (2, "end", 0, 1),
        (2, "end", 1, 1),
        (3, "forward", 0, 1),
        (3, "forward", 1, 1),
        (3, "end", 0, 1),
        (3, "end", 1, 1),
    ]
    assert {(d.expected, d.found) for d in found if d.iteration == 2} == {("weight 2", "changed")}
