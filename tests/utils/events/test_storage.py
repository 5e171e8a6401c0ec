import contextlib
import gc
import io
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.utils.events.storage import EventStorage, get_event_storage, has_event_storage


def test_nothing_is_open_outside_and_the_error_says_how_to_open_one() -> None:
    assert not has_event_storage()
    with pytest.raises(RuntimeError, match=r"No EventStorage is open.*`with EventStorage\(\)"):
        get_event_storage()


def test_innermost_storage_is_the_current_one_also_after_an_error() -> None:
    with EventStorage() as outer:
        inner = EventStorage(7)
        with contextlib.suppress(KeyError), inner:
            assert get_event_storage() is inner
            raise KeyError
        assert get_event_storage() is outer
        assert has_event_storage()
    assert not has_event_storage()


def test_iterations_count_from_the_start() -> None:
    storage = EventStorage(5)
    assert (storage.iter, storage.iteration, storage.start_iter) == (5, 5, 5)
    storage.step()
    storage.put_scalar("a", 1)
    storage.iter = 9
    storage.put_scalar("a", 2)
    storage.put_scalar("a", 3, cur_iter=20)
    assert storage.history("a").values() == [(1.0, 6), (2.0, 9), (3.0, 20)]
    assert storage.latest() == {"a": (3.0, 20)}


def test_put_scalars_puts_each_argument() -> None:
    storage = EventStorage()
    storage.put_scalars(loss=1.5, iou=torch.tensor(2), smoothing_hint=False, cur_iter=4)
    assert storage.latest() == {"loss": (1.5, 4), "iou": (2.0, 4)}
    assert storage.smoothing_hints() == {"loss": False, "iou": False}
    assert set(storage.histories()) == {"loss", "iou"}


def test_put_row_puts_each_value_of_a_tensor() -> None:
    storage = EventStorage(2)
    storage.put_row(["a", "b"], torch.tensor([1.0, 2.0]))
    storage.put_row(["b"], torch.tensor([3.0]), cur_iter=8)
    assert storage.latest() == {"a": (1.0, 2), "b": (3.0, 8)}
    assert storage.smoothing_hints() == {"a": True, "b": True}


@pytest.mark.parametrize("on_device", [False, True])
def test_row_with_too_few_names_is_refused_before_it_is_kept(
    fake_cuda: Any, on_device: bool
) -> None:
    storage = EventStorage()
    row = torch.ones(3)
    with pytest.raises(AssertionError, match=r"2 names, values of torch.Size\(\[3\]\)"):
        storage.put_row(["a", "b"], fake_cuda(row) if on_device else row)
    assert storage.latest() == {}


@pytest.mark.parametrize("on_device", [False, True])
def test_value_that_is_no_scalar_leaves_nothing_behind(fake_cuda: Any, on_device: bool) -> None:
    storage = EventStorage()
    value = torch.ones(2)
    with pytest.raises((RuntimeError, ValueError), match=r"one element|size 2"):
        storage.put_scalar("x", fake_cuda(value) if on_device else value)
    storage.put_scalar("y", 1.0)
    assert storage.latest_with_smoothing_hint() == {"y": (1.0, 0)}


def test_unknown_scalar_names_those_that_exist() -> None:
    storage = EventStorage()
    storage.put_scalar("total_loss", 1.0)
    with pytest.raises(KeyError, match=r"No scalar 'loss' was put.*there are: total_loss"):
        storage.history("loss")


def test_another_smoothing_hint_for_the_same_name_is_refused() -> None:
    storage = EventStorage()
    storage.put_scalar("lr", 0.1, smoothing_hint=False)
    with pytest.raises(ValueError, match="'lr' was put with smoothing_hint=False before"):
        storage.put_scalar("lr", 0.1)
    assert storage.history("lr").values() == [(0.1, 0)]


def test_name_scope_prefixes_nests_and_ends_with_an_exception() -> None:
    storage = EventStorage()
    with storage.name_scope("a"):
        with contextlib.suppress(KeyError), storage.name_scope("b/"):
            storage.put_scalar("x", 1)
            storage.put_image("i", np.zeros((3, 2, 2)))
            storage.put_histogram("h", torch.ones(3))
            raise KeyError
        storage.put_row(["y"], torch.ones(1))
    storage.put_row(["z"], torch.ones(1))
    assert list(storage.histories()) == ["a/b/x", "a/y", "z"]
    assert storage.images[0][0] == "a/b/i"
    assert storage.raw_histograms[0]["tag"] == "a/b/h"


def test_smoothing_covers_iterations_not_values() -> None:
    storage = EventStorage()
    for i in range(30):
        storage.put_scalar("dense", i, cur_iter=i)
        if i % 10 == 0:
            storage.put_scalar("sparse", i, cur_iter=i)
    assert storage.count_samples("dense", 20) == 20
    assert storage.count_samples("sparse", 20) == 2
    smoothed = storage.latest_with_smoothing_hint(20)
    assert smoothed["dense"] == (19.5, 29)
    assert smoothed["sparse"] == (15.0, 20)


def test_several_values_of_an_iteration_all_count() -> None:
    storage = EventStorage()
    for i in range(10):
        for value in (0.0, 1.0, 5.0):
            storage.put_scalar("x", value + i, cur_iter=i)
    assert storage.count_samples("x", 4) == 12
    # Of 6, 7, 8, 9 plus each of 0, 1, 5.
    assert storage.latest_with_smoothing_hint(4)["x"] == (9.0, 9)


def test_unsmoothed_scalars_show_their_latest_value() -> None:
    storage = EventStorage()
    for i in range(3):
        storage.put_scalar("lr", float(i), smoothing_hint=False, cur_iter=i)
    assert storage.latest_with_smoothing_hint() == {"lr": (2.0, 2)}


# Values on an accelerator.


def test_fake_device_refuses_every_way_to_the_host(fake_cuda: Any) -> None:
    value = fake_cuda(torch.tensor(2.0))
    assert value.device == torch.device("cuda:0")
    for read in (
        lambda: value.item(),
        lambda: value.cpu(),
        lambda: value.to("cpu", torch.float64),
        lambda: bool(value * 2),
        lambda: torch.empty(()).copy_(value),
    ):
        with pytest.raises(RuntimeError, match=r"from cuda:0 to the CPU"):
            read()
    assert fake_cuda.num_transfers == 5


def test_d07_device_values_stay_there_until_one_transfer_brings_all(fake_cuda: Any) -> None:
    storage = EventStorage()
    for i in range(100):
        storage.iter = i
        storage.put_scalar("loss", fake_cuda(torch.tensor(float(i))))
        losses = [fake_cuda(torch.tensor(i + 0.5)), fake_cuda(torch.tensor(i - 0.5))]
        storage.put_row(["a", "b"], torch.stack(losses))
        storage.put_scalar("time", 0.25)
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        latest = storage.latest()
    assert latest == {"loss": (99.0, 99), "a": (99.5, 99), "b": (98.5, 99), "time": (0.25, 99)}
    assert storage.history("loss").values() == [(float(i), i) for i in range(100)]
    assert storage.history("a").values() == [(i + 0.5, i) for i in range(100)]
    assert storage.history("b").values() == [(i - 0.5, i) for i in range(100)]
    assert storage.latest_with_smoothing_hint()["a"] == (90.0, 99)
    assert fake_cuda.num_transfers == 1


@pytest.mark.parametrize(
    "read",
    ["latest", "values", "median", "avg", "global_avg", "after", "last", "state_dict"],
)
def test_history_that_somebody_holds_brings_values_over_when_read(
    fake_cuda: Any, read: str
) -> None:
    storage = EventStorage()
    storage.put_scalar("x", 1.0)
    history = storage.history("x")
    storage.put_scalar("x", fake_cuda(torch.tensor(3.0)), cur_iter=1)
    storage.put_scalar("y", fake_cuda(torch.tensor(4.0)))
    arguments = {"median": [1], "avg": [1], "after": [0], "last": [1]}.get(read, [])
    with fake_cuda.transfers_allowed():
        result = getattr(history, read)(*arguments)
    assert fake_cuda.num_transfers == 1
    expected = {"values": [(1.0, 0), (3.0, 1)], "after": [(3.0, 1)], "last": [(3.0, 1)]}
    if read == "state_dict":
        assert result["values"].tolist() == [1.0, 3.0]
    else:
        assert result == expected.get(read, 2.0 if read == "global_avg" else 3.0)
    assert storage.history("y").latest() == 4.0
    assert fake_cuda.num_transfers == 1


def test_reading_values_of_the_cpu_transfers_nothing(fake_cuda: Any) -> None:
    storage = EventStorage()
    storage.put_scalar("time", 1.0)
    storage.put_scalar("loss", fake_cuda(torch.tensor(3.0)))
    assert storage.history("time").latest() == 1.0
    assert fake_cuda.num_transfers == 0


def test_at_most_1024_values_wait(fake_cuda: Any) -> None:
    storage = EventStorage()
    for i in range(512):
        storage.put_row(["a", "b"], fake_cuda(torch.tensor([1.0, 2.0])), cur_iter=i)
    assert fake_cuda.num_transfers == 0
    with fake_cuda.transfers_allowed():
        storage.put_scalar("a", fake_cuda(torch.tensor(3.0)), cur_iter=512)
    assert fake_cuda.num_transfers == 1
    assert storage.history("a").last(2) == [(1.0, 511), (3.0, 512)]
    assert storage.history("b").latest() == 2.0
    # And again.
    for i in range(1024):
        storage.put_scalar("a", fake_cuda(torch.tensor(3.0)), cur_iter=513 + i)
    assert fake_cuda.num_transfers == 1


def test_waiting_and_immediate_values_of_a_name_keep_their_order(fake_cuda: Any) -> None:
    storage = EventStorage()
    storage.put_scalar("x", fake_cuda(torch.tensor(1.0)), cur_iter=0)
    with fake_cuda.transfers_allowed():
        storage.put_scalar("x", 2.0, cur_iter=1)
    storage.put_scalar("x", fake_cuda(torch.tensor(3.0)), cur_iter=2)
    with fake_cuda.transfers_allowed():
        assert storage.history("x").values() == [(1.0, 0), (2.0, 1), (3.0, 2)]


def test_immediate_value_of_a_name_that_no_longer_waits_transfers_nothing(fake_cuda: Any) -> None:
    storage = EventStorage()
    storage.put_scalar("x", fake_cuda(torch.tensor(1.0)))
    with fake_cuda.transfers_allowed():
        storage.latest()
    storage.put_scalar("y", fake_cuda(torch.tensor(2.0)))
    storage.put_scalar("x", 3.0)
    assert storage.history("x").latest() == 3.0
    assert fake_cuda.num_transfers == 1


def test_later_writes_to_the_tensor_do_not_change_what_was_put(fake_cuda: Any) -> None:
    storage = EventStorage()
    on_device, on_cpu = torch.tensor(1.0), torch.tensor(1.0)
    storage.put_scalar("device", fake_cuda(on_device))
    storage.put_scalar("cpu", on_cpu)
    on_device.fill_(7.0)
    on_cpu.fill_(7.0)
    with fake_cuda.transfers_allowed():
        assert storage.latest() == {"device": (1.0, 0), "cpu": (1.0, 0)}


@pytest.mark.parametrize("on_device", [False, True])
def test_large_tensor_behind_a_scalar_is_not_kept_alive(fake_cuda: Any, on_device: bool) -> None:
    storage = EventStorage()
    memory = np.ones(100_000, dtype=np.float32)
    died = weakref.ref(memory)
    tensor = torch.from_numpy(memory)
    element = (fake_cuda(tensor) if on_device else tensor).select(0, 17)
    storage.put_scalar("x", element)
    del memory, tensor
    assert died() is not None
    del element
    gc.collect()
    assert died() is None
    with fake_cuda.transfers_allowed():
        assert storage.latest() == {"x": (1.0, 0)}


def test_graph_behind_a_loss_is_not_kept_alive() -> None:
    storage = EventStorage()
    # On the meta device, which has no values but has graphs.
    weight = torch.ones(3, device="meta", requires_grad=True)
    loss = (weight * 2).sum()
    assert loss.grad_fn is not None
    canary = EventStorage()
    loss.grad_fn.metadata["canary"] = canary  # type: ignore[index]  # torch's stub has a method
    died = weakref.ref(canary)
    storage.put_scalar("loss", loss)
    del canary
    assert died() is not None
    del loss
    gc.collect()
    assert died() is None


def test_dtypes_that_wait_together_keep_their_values(fake_cuda: Any) -> None:
    storage = EventStorage()
    values = {
        "half": torch.tensor(0.5, dtype=torch.float16),
        "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
        "single": torch.tensor(0.1),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor(2**24 + 1),
        "flag": torch.tensor(True),
    }
    for name, value in values.items():
        storage.put_scalar(name, fake_cuda(value))
    with fake_cuda.transfers_allowed():
        latest = storage.latest()
    assert latest == {name: (float(value.item()), 0) for name, value in values.items()}


def test_replace_rows_replaces_later_values_and_adds_names_in_order(fake_cuda: Any) -> None:
    storage = EventStorage()
    for i in range(4):
        storage.put_scalar("loss", fake_cuda(torch.tensor(float(i))), cur_iter=i)
    with fake_cuda.transfers_allowed():
        new = {"zeta": 5.0, "alpha": 6.0, "mid": 7.0, "beta": 8.0}
        storage.replace_rows(1, {2: {"loss": 20.0}, 3: {"loss": 30.0, **new}})
    assert storage.history("loss").values() == [(0.0, 0), (1.0, 1), (20.0, 2), (30.0, 3)]
    assert storage.history("alpha").values() == [(6.0, 3)]
    # A set's order would differ from run to run.
    assert list(storage.histories()) == ["loss", *new]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_puts_do_not_synchronize_with_a_gpu() -> None:
    storage = EventStorage()
    values = torch.arange(2.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(100):
            storage.put_scalar("x", values[0], cur_iter=i)
            storage.put_row(["a", "b"], torch.stack([values[0], values[1]]), cur_iter=i)
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            values[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert storage.latest() == {"x": (0.0, 99), "a": (0.0, 99), "b": (1.0, 99)}


# State.


def test_state_survives_a_weights_only_checkpoint(fake_cuda: Any) -> None:
    storage, resumed = EventStorage(), EventStorage(1500)
    for i in range(1500):
        storage.put_scalar("loss", float(i), cur_iter=i)
    storage.put_scalar("lr", 0.1, smoothing_hint=False)
    storage.put_scalar("waiting", fake_cuda(torch.tensor(4.0)))
    file = io.BytesIO()
    with fake_cuda.transfers_allowed():
        torch.save(storage.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.latest() == storage.latest()
    assert resumed.smoothing_hints() == {"loss": True, "lr": False, "waiting": True}
    for one in (storage, resumed):
        one.put_scalar("loss", 0.0, cur_iter=1500)
    assert resumed.history("loss").values() == storage.history("loss").values()
    assert resumed.history("loss").global_avg() == storage.history("loss").global_avg()
    assert len(resumed.history("loss").values()) == 1024


def test_loading_replaces_values_that_still_wait(fake_cuda: Any) -> None:
    storage = EventStorage()
    storage.put_scalar("x", 1.0)
    state = storage.state_dict()
    storage.put_scalar("x", fake_cuda(torch.tensor(2.0)), cur_iter=1)
    with fake_cuda.transfers_allowed():
        storage.load_state_dict(state)
        assert storage.history("x").values() == [(1.0, 0)]


# Images and histograms.


def test_d34_images_wait_in_order_and_the_oldest_are_dropped() -> None:
    storage = EventStorage()
    for i in range(1000):
        storage.iter = i
        storage.put_image("image", np.full((3, 2, 2), i))
        storage.put_histogram("weights", torch.arange(3.0), bins=2)
    assert [iteration for _, _, iteration in storage.images] == list(range(968, 1000))
    assert len(storage.raw_histograms) == 32
    storage.clear_images()
    storage.clear_histograms()
    assert not storage.images
    assert not storage.raw_histograms


def test_d34_histogram_counts_every_element_of_a_tensor_of_any_shape() -> None:
    storage = EventStorage(3)
    weights = torch.tensor([[0, 1, 1], [4, 4, 4]], dtype=torch.int64)
    storage.put_histogram("weights", weights, bins=4)
    assert storage.raw_histograms[0] == {
        "tag": "weights",
        "min": 0.0,
        "max": 4.0,
        "num": 6,
        "sum": 14.0,
        "sum_squares": 50.0,
        "bucket_limits": [1.0, 2.0, 3.0, 4.0],
        "bucket_counts": [1.0, 2.0, 0.0, 3.0],
        "global_step": 3,
    }


def test_histogram_takes_parameters_and_constants() -> None:
    storage = EventStorage()
    storage.put_histogram("bias", torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16)))
    assert storage.raw_histograms[0]["num"] == sum(storage.raw_histograms[0]["bucket_counts"]) == 8
