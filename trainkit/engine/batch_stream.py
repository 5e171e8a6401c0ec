"""An endless stream of batches from any data loader, which knows where it stands."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from trainkit.utils.errors import ConfigError
from trainkit.utils.random import get_rng_state, isolated_rng, set_rng_state

logger = logging.getLogger(__name__)

_MAX_LISTED = 256


class BatchStream:
    """Draws batches endlessly: a loader that ends is begun again, as the next epoch.

    A loader with `state_dict` and `load_state_dict` (trainkit's own, torchdata's) resumes by them.
    Any other resumes by passing over the batches of the epoch that were consumed; what that cannot
    restore is said once. A loader whose `isolates_randomness` is true leaves the global generators
    as they are.

    Args:
        data_loader: Anything that can be iterated more than once.
    """

    def __init__(self, data_loader: Iterable[Any]) -> None:
        self._loader = data_loader
        self._is_stateful = hasattr(data_loader, "load_state_dict")
        self._tells_samples = hasattr(data_loader, "samples_at")
        self._iterator: Iterator[Any] | None = None
        self._epoch = 0
        self._num_consumed = 0
        self._epoch_rng: dict[str, Any] | None = None

    @property
    def draws_global_randomness(self) -> bool:
        """Whether fetching may draw from the global generators: always, unless it is known not to.

        A state says nothing about it: torchdata's loader has one and fetches in this process.
        """
        return not getattr(self._loader, "isolates_randomness", False)

    def __next__(self) -> Any:
        # Not by its truth, which asks an iterator for its length.
        iterator = self._begin_epoch() if self._iterator is None else self._iterator
        try:
            batch = next(iterator)
        except StopIteration:
            batch = self._next_of_next_epoch()
        self._num_consumed += 1
        return batch

    @property
    def place(self) -> Any:
        """Where the next batch begins: a `TrainLoader`'s position, or (epoch, batches consumed)."""
        if self._tells_samples:
            return self._loader.position  # type: ignore[attr-defined]  # of such a loader
        return self._epoch, self._num_consumed

    def check_can_pass_over(self) -> None:
        """Checks that the loader can leave samples out.

        Raises:
            ConfigError: If it cannot.
        """
        if not hasattr(self._loader, "pass_over"):
            raise ConfigError(
                "SOLVER.NON_FINITE is 'rollback', but the data loader "
                f"({type(self._loader).__name__}) cannot pass over samples. Use trainkit.data's "
                "TrainLoader, or choose 'skip'."
            )

    def pass_over(self, place: Any) -> None:
        """Leaves out the samples of the step that began at `place`."""
        self._loader.pass_over(place)  # type: ignore[attr-defined]  # checked
        self._iterator = None

    def describe(self, place: Any, rank: int | None) -> str:
        """Returns a sentence on the samples of the step that began at `place`.

        Args:
            place: What `place` was then.
            rank: Whose share of the step is meant; None for that of all.
        """
        if not self._tells_samples:
            if self._is_stateful:
                return ""  # Only it knows where it stands.
            return f"The step began with batch {place[1]} of epoch {place[0]}. "
        keys = self._loader.samples_at(place, rank)  # type: ignore[attr-defined]  # of such a loader
        listed = [f"{epoch}:{offset}={index}" for index, epoch, offset in keys[:_MAX_LISTED]]
        more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
        return f"Its samples, as epoch:offset=index: {', '.join(listed)}{more}. "

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch that was drawn."""
        if self._is_stateful:
            return {"loader": self._loader.state_dict()}  # type: ignore[attr-defined]  # checked
        return {
            "epoch": self._epoch,
            "num_consumed": self._num_consumed,
            "epoch_rng": self._epoch_rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position of `state_dict`."""
        self._iterator = None
        if self._is_stateful and "loader" in state:
            self._loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]  # checked
        elif not self._is_stateful and "epoch" in state:
            self._epoch = state["epoch"]
            self._num_consumed = state["num_consumed"]
            self._epoch_rng = state["epoch_rng"]
            logger.warning(
                "The data loader (%s) has no state of its own: %d batches of epoch %d are passed "
                "over. Randomness inside its worker processes and private generators is not "
                "restored; trainkit.data's TrainLoader restores everything.",
                type(self._loader).__name__,
                self._num_consumed,
                self._epoch,
            )
        else:
            logger.warning(
                "The checkpoint holds the position of another kind of data loader than this one "
                "(%s), which begins from its beginning.",
                type(self._loader).__name__,
            )

    def _begin_epoch(self) -> Iterator[Any]:
        if self._is_stateful:
            self._iterator = iter(self._loader)
            return self._iterator
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self._epoch)
        # A loader draws the order of its epoch from the global generators when it is begun.
        resumed = self._epoch_rng is not None and self._num_consumed > 0
        with isolated_rng() if resumed else contextlib.nullcontext():
            generator = getattr(self._loader, "generator", None)
            if resumed and self._epoch_rng is not None:
                set_rng_state(self._epoch_rng)
                if generator is not None:
                    generator.set_state(self._epoch_rng["loader"])
            self._epoch_rng = get_rng_state()
            if generator is not None:
                self._epoch_rng["loader"] = generator.get_state()
            self._iterator = self._passing_over(self._num_consumed)
        return self._iterator

    def _passing_over(self, count: int) -> Iterator[Any]:
        """Begins the loader after `count` batches, without fetching them where that is possible."""
        loader = self._loader
        if (
            count == 0
            or not isinstance(loader, DataLoader)
            or type(loader).__iter__ is not DataLoader.__iter__
            or isinstance(loader.dataset, IterableDataset)
            or loader.batch_sampler is None
        ):
            iterator = iter(loader)
            # Now, while the generators are as they were when the epoch was begun.
            next(islice(iterator, count, count), None)
            return iterator
        # An unbroken loader draws the seed of its workers before its sampler draws the order.
        entries = iter(loader.batch_sampler)
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        # Now, for the same reason; and no further than that, for a sampler may never end.
        next(islice(entries, count, count), None)
        return iter(
            DataLoader(
                loader.dataset,
                batch_sampler=entries,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                generator=torch.Generator(),
                prefetch_factor=loader.prefetch_factor,
            )
        )

    def _next_of_next_epoch(self) -> Any:
        self._iterator = None
        self._epoch += 1
        consumed, self._num_consumed = self._num_consumed, 0
        try:
            return next(self._begin_epoch())
        except StopIteration:
            kind = type(self._loader).__name__
            if iter(self._loader) is self._loader:
                raise ConfigError(
                    f"The data loader ({kind}) is an iterator that ended after {consumed} batches "
                    "and cannot begin again. Pass something iterable, such as a DataLoader."
                ) from None
            raise ConfigError(
                f"The data loader ({kind}) yields no batch. Its data set may be empty, or smaller "
                "than one batch while drop_last is on."
            ) from None
