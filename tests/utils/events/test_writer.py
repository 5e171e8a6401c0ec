import copy

import pytest

from trainkit.utils.events.storage import EventStorage
from trainkit.utils.events.writer import EventWriter, NewValues


def test_writer_must_say_how_it_writes() -> None:
    with pytest.raises(NotImplementedError):
        EventWriter().write()


def test_writer_without_a_state_can_be_saved_closed_and_resumed() -> None:
    writer = EventWriter()
    assert writer.state_dict() == {}
    writer.load_state_dict({})
    writer.close()


def put(storage: EventStorage, iterations: range) -> None:
    """A noisy loss and a learning rate at every iteration."""
    for i in iterations:
        storage.iter = i
        storage.put_scalar("loss", float(i % 2))
        storage.put_scalar("lr", 0.1 * i, smoothing_hint=False)


def test_dense_values_give_their_latest_once() -> None:
    storage, new_values = EventStorage(), NewValues(window_size=3)
    put(storage, range(20))
    assert new_values.take(storage) == {19: {"loss": 1.0, "lr": 0.1 * 19}}
    assert new_values.take(storage) == {}
    put(storage, range(20, 23))
    assert new_values.take(storage) == {22: {"loss": 0.0, "lr": 0.1 * 22}}


def test_d32_sparse_values_give_all_in_the_order_of_iterations() -> None:
    storage, new_values = EventStorage(), NewValues(20)
    put(storage, range(20))
    for i in (12, 4, 17):
        storage.put_scalar(f"top1_{i}", float(i), smoothing_hint=False, cur_iter=i)
    for i in (4, 12):
        storage.put_scalar("top1", float(i), smoothing_hint=False, cur_iter=i)
    taken = new_values.take(storage)
    assert list(taken) == [4, 12, 17, 19]
    assert [taken[i].get("top1") for i in taken] == [4.0, 12.0, None, None]
    storage.put_scalar("top1", 21.0, smoothing_hint=False, cur_iter=21)
    assert new_values.take(storage) == {21: {"top1": 21.0}}


def test_d32_smoothed_values_put_now_and_then_give_all_and_else_one_median() -> None:
    storage, new_values = EventStorage(), NewValues(20)
    for i in (2, 9, 16):
        storage.put_scalar("loss_val", float(i), cur_iter=i)
    for i in range(6, 17):
        storage.put_scalar("loss", float(i), cur_iter=i)
    assert new_values.take(storage) == {
        2: {"loss_val": 2.0},
        9: {"loss_val": 9.0},
        16: {"loss_val": 16.0, "loss": 11.0},
    }


def test_d32_value_put_after_the_write_of_its_iteration_is_new() -> None:
    storage, new_values = EventStorage(), NewValues(20)
    put(storage, range(20))
    new_values.take(storage)
    storage.put_scalar("top1", 0.5, smoothing_hint=False)
    assert new_values.take(storage) == {19: {"top1": 0.5}}


def test_values_before_the_start_of_the_run_are_not_new() -> None:
    earlier, storage, new_values = EventStorage(), EventStorage(10), NewValues(20)
    put(earlier, range(10))
    earlier.put_scalar("top1", 0.5, smoothing_hint=False)
    storage.load_state_dict(earlier.state_dict())
    assert new_values.take(storage) == {}
    put(storage, range(10, 12))
    assert list(new_values.take(storage)) == [11]


@pytest.mark.parametrize("cut", [5, 10, 19, 20, 30])
def test_state_brings_back_what_is_left_to_write(cut: int) -> None:
    """Cut after iteration `cut - 1`; a first write comes after iteration 14."""
    storage, new_values = EventStorage(), NewValues(20)

    def run(storage: EventStorage, new_values: NewValues, iterations: range) -> list[object]:
        taken: list[object] = []
        with storage:
            for i in iterations:
                put(storage, range(i, i + 1))
                if i % 4 == 0:
                    storage.put_scalar("top1", float(i), smoothing_hint=False)
                if i % 15 == 14:
                    taken.append(copy.deepcopy(new_values.take(storage)))
        return taken

    unbroken = run(EventStorage(), NewValues(20), range(45))
    before = run(storage, new_values, range(cut))
    resumed_storage, resumed_values = EventStorage(cut), NewValues(20)
    resumed_storage.load_state_dict(storage.state_dict())
    with storage:
        resumed_values.load_state_dict(new_values.state_dict())
    assert before + run(resumed_storage, resumed_values, range(cut, 45)) == unbroken


def test_next_iter_is_the_start_and_then_follows_what_was_written() -> None:
    storage, new_values = EventStorage(10), NewValues(20)
    assert new_values.next_iter(storage) == 10
    put(storage, range(10, 13))
    new_values.take(storage)
    assert new_values.next_iter(storage) == 13
    resumed = NewValues(20)
    resumed.load_state_dict(new_values.state_dict())
    assert resumed.next_iter(EventStorage(99)) == 13
