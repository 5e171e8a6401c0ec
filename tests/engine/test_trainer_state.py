"""What decides a trainer's future; that a resume is exact is shown in test_resume.py."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainkit.engine.train_loop import SimpleTrainer
from trainkit.engine.trainer_state import PER_RANK, load_local_state, local_state
from trainkit.utils.errors import CheckpointError

MakeTrainer = Callable[..., SimpleTrainer]


def state_of(trainer: SimpleTrainer) -> dict[str, Any]:
    state = copy.deepcopy(local_state(trainer))
    return {key: [part] if key in PER_RANK else part for key, part in state.items()}


def test_a_state_is_taken_back(simple: MakeTrainer) -> None:
    trainer, other = simple(seed=3), simple(seed=4)
    trainer.train(0, 3)
    state = state_of(trainer)
    load_local_state(other, state)
    assert other.seed == 3
    assert other._batches.place == trainer._batches.place == (0, 3)
    momenta = [s["momentum_buffer"] for s in other.optimizer.state_dict()["state"].values()]
    assert all(torch.any(momentum != 0) for momentum in momenta)


def test_a_state_of_an_earlier_version_or_another_precision_is_taken_back(
    simple: MakeTrainer,
) -> None:
    trainer = simple(precision="fp16")
    state = state_of(simple())
    assert state["grad_scaler"] == {}
    load_local_state(trainer, {"optimizer": state["optimizer"]})
    load_local_state(trainer, state)
    assert trainer.grad_scaler.get_scale() == 65536.0


def test_a_state_of_another_kind_of_optimizer_is_refused(simple: MakeTrainer) -> None:
    trainer = simple()
    adam = torch.optim.Adam(trainer.model.parameters()).state_dict()
    with pytest.raises(CheckpointError, match="not a SGD"):
        load_local_state(trainer, {**state_of(trainer), "optimizer": adam})
