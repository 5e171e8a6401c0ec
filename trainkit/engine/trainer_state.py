"""What decides the future of a `SimpleTrainer`, besides its loop and its hooks."""

from typing import Any

from trainkit.engine.losses import load_own_buffers, own_buffers
from trainkit.solver.build import check_same_kind
from trainkit.utils import comm
from trainkit.utils.random import get_rng_state

PER_RANK = ("data", "rng", "buffers")
"""Parts in which ranks differ; checkpoints hold a list of them."""


def local_state(trainer: Any) -> dict[str, Any]:
    """Returns the parts that one rank knows."""
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "grad_scaler": trainer.grad_scaler.state_dict(),
        "data": trainer._batches.state_dict(),
        "buffers": own_buffers(trainer.model),
        "non_finite": trainer._guard.state_dict(),
        "seed": trainer.seed,
        # With a seed too: hooks may draw, in the step that a checkpoint cuts.
        "rng": get_rng_state(trainer.device),
    }


def load_local_state(trainer: Any, state: dict[str, Any]) -> None:
    """Takes the parts back, but for the generators, which are set when the run begins.

    Raises:
        CheckpointError: If the optimizer is of another kind.
    """
    check_same_kind(trainer.optimizer, state["optimizer"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    # Empty if the run had another precision.
    if state.get("grad_scaler"):
        trainer.grad_scaler.load_state_dict(state["grad_scaler"])
    trainer.seed = state.get("seed", trainer.seed)
    load_own_buffers(trainer.model, state.get("buffers", []))
    if "data" in state:
        trainer._batches.load_state_dict(state["data"][comm.get_rank() % len(state["data"])])
    trainer._guard.load_state_dict(state.get("non_finite", {}))
