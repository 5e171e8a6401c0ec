"""`TorchProfiler`: traces of chosen steps, for TensorBoard or a browser."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trainkit.engine.hook_base import HookBase
from trainkit.utils import comm
from trainkit.utils.file_io import PathManager


class TorchProfiler(HookBase):
    """Profiles each enabled step by itself, with shapes, memory, stacks and FLOPs.

    A trace is a file for a browser (chrome://tracing, ui.perfetto.dev). It holds `after_step` of
    the hooks that are registered before this one.

    Args:
        enable_predicate: Given the trainer, tells whether to profile the step to come, as in
            `lambda trainer: trainer.iter in (10, 20)`.
        output_dir: A path, or an address that `PathManager` can write to.
        activities: Those of `torch.profiler.profile`; all that there are by default.
        save_tensorboard: Whether traces go to folders `log/profiler-tensorboard-iter10` for
            TensorBoard, and not to files `profiler-trace-iter10.json`.
    """

    def __init__(
        self,
        enable_predicate: Callable[[Any], bool],
        output_dir: str | os.PathLike[str],
        *,
        activities: Iterable[ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._enable_predicate = enable_predicate
        self._output_dir = os.fspath(output_dir)
        self._activities = None if activities is None else list(activities)
        self._save_tensorboard = save_tensorboard
        self._profile: profile | None = None

    def before_step(self) -> None:
        """Starts a profile, if this step is to have one."""
        if self._enable_predicate(self.trainer):
            self._profile = profile(
                activities=self._activities,
                record_shapes=True,
                profile_memory=True,
                with_stack=True,
                with_flops=True,
            )
            self._profile.start()

    def after_step(self) -> None:
        """Ends the profile and writes it."""
        if (ended := self._stop()) is None:
            return
        iteration, rank = self.trainer.iter, comm.get_rank()
        folder, name = self._output_dir, f"profiler-trace-iter{iteration}"
        if self._save_tensorboard:
            folder = os.path.join(folder, "log", f"profiler-tensorboard-iter{iteration}")
            name = f"worker{rank}.{time.time_ns()}.pt.trace"
        elif rank:
            name += f"-rank{rank}"
        PathManager.mkdirs(folder)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            ended.export_chrome_trace(file.name)
            path = os.path.join(folder, f"{name}.json")
            PathManager.copy_from_local(file.name, path, overwrite=True)

    def after_train(self) -> None:
        """Ends the profile of a step that failed, which would go on collecting."""
        self._stop()

    def _stop(self) -> profile | None:
        started, self._profile = self._profile, None
        if started is not None:
            started.stop()
        return started


class AutogradProfiler(TorchProfiler):
    """`TorchProfiler` by an older name: on the CPU, and with `use_cuda` on CUDA if there is any."""

    def __init__(
        self,
        enable_predicate: Callable[[Any], bool],
        output_dir: str | os.PathLike[str],
        *,
        use_cuda: bool = True,
    ) -> None:
        activities = [ProfilerActivity.CPU]
        if use_cuda and torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        super().__init__(
            enable_predicate, output_dir, activities=activities, save_tensorboard=False
        )
