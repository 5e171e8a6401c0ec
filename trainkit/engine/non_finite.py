"""What is done about a step whose losses or gradients are not finite."""

import logging
import math
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from trainkit.engine.losses import TensorCopies
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage

POLICIES = ("raise", "skip", "rollback")

MAX_IN_A_ROW = 20
"""Skipped steps in a row after which the run ends: not single batches are at fault then."""

MAX_ROLLBACKS = 5
"""Times that a run goes back to one and the same checkpoint before it gives up."""

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A step whose loss or gradient is not finite; its effects are in no checkpoint.

    Args:
        message: Names iteration, rank, values and samples.
        iteration: The first such iteration.
    """

    def __init__(self, message: str, iteration: int = -1) -> None:
        super().__init__(message)
        self.iteration = iteration


class NonFiniteGuard:
    """Judges each step by its reduced gradient norm, which all ranks know alike.

    Args:
        policy: "raise" ends the run: on the CPU before the update, on an accelerator when metrics
            are next brought together. "skip" leaves the update out, and undoes what the forward
            pass did to the model's buffers. "rollback" raises before the update, and
            `DefaultTrainer` then goes back to the last checkpoint and passes the batch over. These
            two wait for an accelerator in every step.

    Attributes:
        num_skipped: Updates left out so far.

    Raises:
        ConfigError: If there is no such policy.
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ConfigError(
                f"SOLVER.NON_FINITE (non_finite) is {policy!r}; it must be one of "
                f"{', '.join(map(repr, POLICIES))}."
            )
        self.policy = policy
        self.num_skipped = 0
        self._num_in_a_row = 0
        self._buffers: TensorCopies | None = None

    @property
    def judges_now(self) -> bool:
        """Whether each step is judged before its update on accelerators too, which waits."""
        return self.policy != "raise"

    def begin_step(self, model: nn.Module) -> None:
        """Keeps what a skipped step must leave as it was."""
        if self.policy == "skip":
            self._buffers = TensorCopies(lambda: dict(model.named_buffers()))

    def must_skip(self, grad_norm: torch.Tensor | float) -> bool:
        """Whether the update is to be left out."""
        if self.policy != "skip":
            return False
        if math.isfinite(float(grad_norm)):
            self._num_in_a_row = 0
            return False
        return True

    def norm_of_update(
        self, grad_norm: torch.Tensor | float, scaler: GradScaler
    ) -> torch.Tensor | float:
        """Returns the norm for the metrics; 0 of a step that a scaler leaves out, as it may."""
        if not scaler.is_enabled():
            return grad_norm
        norm = torch.as_tensor(grad_norm)
        return torch.where(norm.isfinite(), norm, 0.0)

    def skip(self, storage: EventStorage, loss_dict: dict[str, torch.Tensor], samples: str) -> None:
        """Undoes a step, and says so; its losses stay out of the metrics, where NaN would linger.

        Args:
            storage: Takes the number of skipped steps.
            loss_dict: This rank's losses, 0-d.
            samples: A sentence on its samples.

        Raises:
            NonFiniteError: If too many steps in a row were skipped.
        """
        assert self._buffers is not None, "begin_step comes first"
        self._buffers.restore()
        self.num_skipped += 1
        self._num_in_a_row += 1
        storage.put_scalar("skipped_steps", self.num_skipped, smoothing_hint=False)
        listed = ", ".join(f"{name}={value.item():g}" for name, value in loss_dict.items())
        text = (
            f"The gradient of iteration {storage.iter} is not finite. The losses of rank "
            f"{comm.get_rank()}: {listed}. {samples}"
        )
        logger.warning("%sThe update is skipped, %d so far.", text, self.num_skipped)
        if self._num_in_a_row >= MAX_IN_A_ROW:
            raise NonFiniteError(
                f"{text}So were those of the {MAX_IN_A_ROW - 1} steps before, which were skipped: "
                "lower the learning rate (SOLVER.BASE_LR) or check the data.",
                storage.iter,
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self._num_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.num_skipped = state.get("num_skipped", 0)
        self._num_in_a_row = state.get("num_in_a_row", 0)
