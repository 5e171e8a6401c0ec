import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.engine.run_processes import assert_same
from trainkit.engine.undisturbed import undisturbed
from trainkit.utils.events.storage import EventStorage, get_event_storage
from trainkit.utils.random import get_rng_state


class Noisy(nn.Module):
    """Draws from all generators, puts a metric, and replaces a buffer."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.BatchNorm1d(2).eval()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + random.random() + np.random.rand()
        get_event_storage().put_scalar("seen", self.seen)
        output: torch.Tensor = self.frozen(self.norm(x + torch.rand_like(x)))
        return output


@pytest.mark.parametrize("fails", [False, True])
def test_d36_nothing_is_left_of_it_also_after_an_error(fails: bool) -> None:
    model = Noisy()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = get_rng_state()
    with EventStorage() as storage:
        try:
            with undisturbed(model) as same:
                output = same.eval()(torch.ones(3, 2))
                assert not output.requires_grad
                assert model.norm.num_batches_tracked == 1
                if fails:
                    raise ValueError("within")
        except ValueError:
            assert fails
    assert storage.histories() == {}
    assert_same(dict(model.named_buffers()), buffers)
    assert_same(get_rng_state(), before)
    assert [m.training for m in model.modules()] == [True, True, False]
