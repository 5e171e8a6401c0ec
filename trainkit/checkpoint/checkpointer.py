"""`Checkpointer`: saves the whole state of a run, and finds the newest that can be trusted."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from trainkit.checkpoint import folder as run_folder
from trainkit.checkpoint.background import BackgroundSaver, Surviving
from trainkit.checkpoint.format import (
    explaining,
    load_checkpoint,
    load_safetensors,
    write_checkpoint,
)
from trainkit.checkpoint.manifest import Fact, Manifest, read_manifest
from trainkit.checkpoint.matching import (
    ABSENT,
    check_has_all,
    check_is_same,
    check_none,
    explaining_misfit,
    find_weights,
    list_incompatible,
    load_what_fits,
    split_options,
    tabulate_differences,
)
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError
from trainkit.utils.file_io import PathManager, leads_out
from trainkit.utils.wrappers import unwrap


class Checkpointer(_Checkpointer):
    """fvcore's checkpointer, with files that verify themselves and appear whole or not at all.

    Every rank calls its methods, unless they say otherwise: state dicts may be gathered from all
    ranks, rank 0 writes and decides, and an error of one rank is raised on all.

    Args:
        model: Unwrapped from DistributedDataParallel, DataParallel and torch.compile.
        save_dir: Folder of the checkpoints, made when it is needed; "" saves nothing.
        save_to_disk: Whether to save at all, as by default; rank 0's counts.
        trust_pickle: Whether code in a file that `load` is given may run; in what is resumed from
            it never does.
        checkpointables: Objects with `state_dict` and `load_state_dict`, by name.

    Attributes:
        background: Has the save in flight that `save_in_background` began.
        facts: Plain values for the manifests of coming checkpoints, such as the optimizer's
            implementation.
        loaded_manifest: The manifest of what was loaded last, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str] = "",
        *,
        save_to_disk: bool | None = None,
        trust_pickle: bool = False,
        **checkpointables: Any,
    ) -> None:
        is_saving = save_to_disk is not False
        super().__init__(
            unwrap(model), os.fspath(save_dir), save_to_disk=is_saving, **checkpointables
        )
        self.logger = logging.getLogger(__name__)
        self.path_manager = PathManager
        self.background = BackgroundSaver()
        self.facts: dict[str, Fact] = {}
        self.loaded_manifest: Manifest | None = None
        self._saved: tuple[object, ...] = ()
        self._trust_pickle = trust_pickle
        self._may_run_code = False

    def add_checkpointable(self, key: str, checkpointable: Any) -> None:
        """Adds an object with a `state_dict`, under a name not yet in use."""
        if key in ("model", *self.checkpointables):
            raise KeyError(
                f"The checkpointer already saves something as {key!r}; name it otherwise."
            )
        if not hasattr(checkpointable, "state_dict"):
            raise TypeError(
                f"What is to be saved as {key!r} is a {type(checkpointable).__name__}, which needs "
                "the methods state_dict() and load_state_dict(state)."
            )
        self.checkpointables[key] = checkpointable

    def save(self, name: str, **extra: Any) -> None:
        """Saves model, checkpointables and extra data as `{name}.pth`, and points to it.

        Args:
            name: Of the file, without ".pth"; a file that has it is replaced in one instant.
            extra: Tensors and plain values; `iteration` enters the manifest too.

        Raises:
            CheckpointError: If something in the state cannot be stored.
            CheckpointWriteError: If the storage refuses it; what was saved before is intact then.
        """
        if self.save_untagged(name, **extra) and comm.is_main_process():
            self.tag_last_checkpoint(f"{name}.pth")

    def save_untagged(self, name: str, **extra: Any) -> bool:
        """Like `save`, but leaves the pointer to the last checkpoint alone.

        Returns:
            Whether a file was written.
        """
        if not self._is_saving(name):
            return False
        data = self._gather(extra)
        comm.on_main(lambda: self._write(name, data, self.facts))
        return True

    def save_in_background(
        self, name: str, then: Callable[[], None], surviving: Surviving, **extra: Any
    ) -> None:
        """Like `save`, but holds its caller for a copy of the state only: a thread writes it.

        Whatever saves or looks for checkpoints next waits for it first, as `background.wait` does.

        Args:
            name: Of the file, without ".pth".
            then: Called in that thread after all else; it must not communicate.
            surviving: Makes the context in which every rank then learns of an error.
            **extra: Tensors and plain values, as of `save`.
        """
        if self._is_saving(name):
            facts = dict(self.facts)

            def write(data: Mapping[str, Any]) -> None:
                self._write(name, data, facts)
                self.tag_last_checkpoint(f"{name}.pth")
                then()

            self.background.start(write, self._gather(extra), surviving)

    def save_weights(
        self, name: str, state_dict: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """Saves weights alone, a small file that `load` and `torch.load` read but no resume takes.

        Args:
            name: Of the file, without ".pth".
            state_dict: Returns the weights, such as averaged ones; the model's own by default.
        """
        if self._is_saving(name):
            weights = comm.together(state_dict or self.model.state_dict)
            comm.on_main(lambda: self._write(name, weights, {run_folder.WEIGHTS_ONLY: True}))

    def load(
        self, path: str, checkpointables: list[str] | None = None, *, strict: bool = False
    ) -> dict[str, Any]:
        """Loads what fits into the model, and the checkpointables, from one file.

        Args:
            path: Path or address of the file, on the web with its SHA-256, as in
                `https://host/x.pth#sha256=…`; "" loads nothing. With `?matching_heuristics=True`
                behind it, entries whose names only end alike are loaded too (`match_suffixes`),
                and `?strict=True` stands for `strict`.
            checkpointables: Names of those to load; None loads all, [] the model only.
            strict: Whether it is an error if the model and the file differ in a name or a shape.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: If the file is missing, damaged, would run code, or nothing in it fits;
                or if `strict` is violated, and then what fits is loaded.
        """
        path, options = split_options(os.fspath(path or ""))
        if not path:
            self.logger.info("No checkpoint given: the model starts from its initialization")
            return {}
        self.logger.info("Loading from %s", path)
        names = self.checkpointables if checkpointables is None else checkpointables
        checkpoint = self._read(path)
        if "matching_heuristics" in options:
            checkpoint["matching_heuristics"] = True
        return self._restore(checkpoint, path, names, strict or "strict" in options)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Goes on from the newest valid checkpoint, or loads the model's weights from `path`.

        Args:
            path: Where weights come from if there is no checkpoint, or none is asked for.
            resume: Whether to look for checkpoints in `save_dir`. The newest valid one must fit the
                model exactly, and everything in it is loaded.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: If there are checkpoints and none is valid, or the newest is of another
                model, which is then untouched; or as in `load`.
        """
        candidates = self.get_all_checkpoint_files() if resume else []
        return self._resume(candidates) if candidates else self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Whether there is any checkpoint in `save_dir`, valid or not."""
        return bool(self.get_all_checkpoint_files())

    def get_checkpoint_file(self) -> str:
        """Returns the newest valid checkpoint, or "" if there is none; says what it skips."""
        self.background.wait()
        folder = Path(self.save_dir)
        return comm.on_main(lambda: run_folder.newest_valid(folder) if self.save_dir else "")

    def get_all_checkpoint_files(self) -> list[str]:
        """Returns all published checkpoints in `save_dir`, valid or not, newest first."""
        self.background.wait()
        return comm.on_main(lambda: [os.fspath(path) for path in self._ranked()])

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Points to a checkpoint, for people and other programs; only rank 0 calls it.

        A resume does not need the pointer, so a failure to write it is no more than a warning.
        """
        run_folder.point_to(Path(self.save_dir), last_filename_basename)

    def keep_newest(self, file_prefix: str, max_to_keep: int) -> None:
        """Deletes all `{file_prefix}_NNNNNNN.pth` but the newest, whichever process saved them.

        The newest valid one stays in any case. Does nothing on other ranks than 0.
        """
        if not (comm.is_main_process() and self.save_to_disk):
            return
        surplus = run_folder.surplus(self._ranked(), file_prefix, max_to_keep, self._is_valid)
        for path in surplus:
            self.delete(path)

    def delete(self, name: str | os.PathLike[str]) -> None:
        """Deletes a published checkpoint, as far as it can; only rank 0 calls it.

        Args:
            name: With or without ".pth" and the path of `save_dir`.
        """
        path = Path(self.save_dir, f"{Path(name).name.removesuffix('.pth')}.pth")
        if Path(name).parent not in (Path(), path.parent):
            raise ValueError(f"{os.fspath(name)!r} is not in {self.save_dir!r}, so it is not ours.")
        run_folder.delete(path)

    def mark_finished(self, iteration: int) -> None:
        """Notes that the run came to its end after 0-based `iteration`, its last hooks included."""
        if self.save_dir and self.save_to_disk and comm.is_main_process():
            run_folder.mark_finished(Path(self.save_dir), iteration)

    def finished_iteration(self) -> int | None:
        """Returns the iteration after which the run came to its end, or None."""
        folder = Path(self.save_dir)
        return comm.on_main(lambda: run_folder.read_finished(folder) if self.save_dir else None)

    def clear_finished(self) -> None:
        """Notes that the run goes on."""
        if self.save_dir:
            marker = Path(self.save_dir, run_folder.FINISHED)
            comm.on_main(lambda: marker.unlink(missing_ok=True) if self.save_to_disk else None)

    def _gather(self, extra: dict[str, Any]) -> dict[str, Any]:
        parts = {"model": self.model, **self.checkpointables}
        # One by one: a part may communicate.
        return {name: comm.together(part.state_dict) for name, part in parts.items()} | extra

    def _is_saving(self, name: str) -> bool:
        self.background.wait()
        if not comm.broadcast(bool(self.save_dir) and self.save_to_disk):
            return False
        if os.path.basename(name) != name or not name:
            raise ValueError(f"The checkpoint's name is {name!r}; give a file name, not a path.")
        return True

    def _write(self, name: str, data: Mapping[str, Any], facts: Mapping[str, Fact]) -> None:
        folder = Path(self.save_dir)
        path = folder / f"{name}.pth"
        iteration = data.get("iteration")
        start = time.perf_counter()
        with explaining(path, data):
            folder.mkdir(parents=True, exist_ok=True)
            run_folder.remove_stale(folder)
            write_checkpoint(
                data,
                path,
                iteration=iteration if isinstance(iteration, int) else None,
                world_size=comm.get_world_size(),
                facts=facts,
                after_ns=run_folder.newest_time_ns(folder),
            )
            num_bytes, self._saved = path.stat().st_size, run_folder.signature(path)
        seconds = time.perf_counter() - start
        self.logger.info(f"Saved checkpoint to {path}: {num_bytes:,} bytes in {seconds:.2f} s")

    def _ranked(self) -> list[Path]:
        return run_folder.newest_first(Path(self.save_dir)) if self.save_dir else []

    def _is_valid(self, path: Path) -> bool:
        # What this process wrote last is not read again at every save.
        with contextlib.suppress(OSError):
            if run_folder.signature(path) == self._saved:
                return True
        return not run_folder.find_fault(path)

    def _resume(self, candidates: list[str]) -> dict[str, Any]:
        faults = []
        for path in candidates:
            try:
                checkpoint = self._read(path, is_own=True)
                check_has_all(checkpoint, path, self.checkpointables)
            except CheckpointError as e:
                # Its text only: a handler that keeps records would keep the frames of the error.
                fault = str(e)
                self.logger.warning("SKIPPING A CHECKPOINT. %s", fault)
                faults.append(f"  {fault}")
                continue
            check_is_same(checkpoint["model"], path, self.model)
            self.logger.info("Resuming from %s", path)
            return self._restore(checkpoint, path, self.checkpointables)
        raise CheckpointError(
            f"No checkpoint in {self.save_dir!r}, of {len(candidates)}, can be resumed from:\n"
            + "\n".join(faults)
            + "\nPut a sound one there, or start anew in another OUTPUT_DIR or without --resume."
        )

    def _read(self, path: str, *, is_own: bool = False) -> dict[str, Any]:
        """Verifies and loads a file, `save_dir`'s own or another, on every rank or on none."""
        self._may_run_code = self._trust_pickle and not is_own

        def read() -> tuple[dict[str, Any], Manifest | None]:
            local = run_folder.local_file(path, self.path_manager)
            if is_own and leads_out(local):
                raise CheckpointError(f"{path} was refused: {run_folder.find_fault(Path(local))}.")
            return find_weights(self._load_file(local), path), read_manifest(local)

        # A disk that only rank 0 sees: it sends the others what it reads.
        is_seen = comm.all_gather(os.path.isfile(path))
        everywhere = comm.on_main if is_seen[0] and not all(is_seen) else comm.together
        checkpoint, self.loaded_manifest = everywhere(read)
        return checkpoint

    def _load_file(self, f: str) -> dict[str, Any]:
        """Verifies and loads a local file; a subclass may read other formats.

        Returns:
            A dict with "model" or "state_dict", or of weights alone.
        """
        if f.endswith(".safetensors"):
            return load_safetensors(f)
        return cast(dict[str, Any], load_checkpoint(f, trust_pickle=self._may_run_code))

    def _restore(
        self, checkpoint: dict[str, Any], path: str, names: Iterable[str], strict: bool = False
    ) -> dict[str, Any]:
        with explaining_misfit("the model", path):
            incompatible = self._load_model(checkpoint)
        # Subclasses written for fvcore may return nothing.
        if incompatible is not None:
            found = list_incompatible(self.model, incompatible)
            if strict:
                check_none(found, path)
            self._log_incompatible_keys(incompatible)
        for name in names:
            if name not in checkpoint:
                self.logger.warning("%s has no state of %s, which stays as it is", path, name)
                continue
            with explaining_misfit(name, path):
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        """Loads what fits; a subclass may change `checkpoint["model"]` first.

        Entry "matching_heuristics", which files of detectron2's model zoo have, see `load`.

        Raises:
            CheckpointError: If nothing fits; the model is untouched then.
        """
        heuristics = checkpoint.pop("matching_heuristics", False) is True
        return load_what_fits(self.model, checkpoint.pop("model"), heuristics)

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        """Reports what was not loaded, in one warning."""
        found = list_incompatible(self.model, incompatible)
        num_own, num_lost = len(self.model.state_dict()), sum(d.in_model != ABSENT for d in found)
        self.logger.info("Loaded %d of the model's %d entries", num_own - num_lost, num_own)
        text = "What fits the model was loaded. The rest was not:\n%s"
        if found:
            self.logger.warning(text, tabulate_differences(found))


DetectionCheckpointer = Checkpointer
"""The same under detectron2's name."""
