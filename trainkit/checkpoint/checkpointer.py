"""`Checkpointer`: saves the whole state of a run, and finds the newest that can be trusted."""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from trainkit.checkpoint import folder as run_folder
from trainkit.checkpoint.format import (
    explaining,
    load_checkpoint,
    load_safetensors,
    write_checkpoint,
)
from trainkit.checkpoint.manifest import Fact, Manifest, read_manifest
from trainkit.checkpoint.matching import (
    align_names,
    differences,
    find_weights,
    list_incompatible,
    load_what_fits,
    tabulate_differences,
    unwrap,
)
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError
from trainkit.utils.file_io import PathManager, leads_out, write_atomically

_TRANSFER = (
    "To take over the weights that fit, set MODEL.WEIGHTS to the file and start without --resume, "
    "or in another OUTPUT_DIR."
)


@contextlib.contextmanager
def _naming(what: str, path: str) -> Iterator[None]:
    """Turns whatever a state that does not fit makes fail into what a user can mend."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        raise CheckpointError(
            f"Cannot restore {what} from {path}: {type(e).__name__}: {e}. It was saved by another "
            f"configuration. {_TRANSFER}"
        ) from e


class Checkpointer(_Checkpointer):
    """fvcore's checkpointer, with files that verify themselves and appear whole or not at all.

    Every rank calls its methods, unless they say otherwise: state dicts may be gathered from all
    ranks, rank 0 writes and decides, and an error of one rank is raised on all.

    Args:
        model: Unwrapped from DistributedDataParallel, DataParallel and torch.compile.
        save_dir: Folder of the checkpoints, made when it is needed; "" saves nothing.
        save_to_disk: Whether to save at all; rank 0's counts.
        trust_pickle: Whether code in a file that `load` is given may run; in what is resumed from
            it never does.
        checkpointables: Objects with `state_dict` and `load_state_dict`, by name.

    Attributes:
        facts: Plain values for the manifests of coming checkpoints, such as the optimizer's
            implementation.
        loaded_manifest: The manifest of what was loaded last, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str] = "",
        *,
        save_to_disk: bool = True,
        trust_pickle: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(
            unwrap(model), os.fspath(save_dir), save_to_disk=save_to_disk, **checkpointables
        )
        self.logger = logging.getLogger(__name__)
        self.path_manager = PathManager
        self.facts: dict[str, Fact] = {}
        self.loaded_manifest: Manifest | None = None
        self._saved: tuple[object, ...] = ()
        self._trust_pickle = trust_pickle
        self._may_run_code = False

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
        if not comm.broadcast(bool(self.save_dir) and self.save_to_disk):
            return False
        if os.path.basename(name) != name or not name:
            raise ValueError(f"The checkpoint's name is {name!r}; give a file name, not a path.")
        parts = {"model": self.model, **self.checkpointables}
        # One by one: a part may communicate.
        data = {name: comm.together(part.state_dict) for name, part in parts.items()} | extra
        comm.on_main(lambda: self._write(name, data))
        return True

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads what fits into the model, and the checkpointables, from one file.

        Args:
            path: Path or address of the file, on the web with its SHA-256, as in
                `https://host/x.pth#sha256=…`; "" loads nothing.
            checkpointables: Names of those to load; None loads all, [] the model only.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: If the file is missing, damaged, would run code, or nothing in it fits.
        """
        if not path:
            self.logger.info("No checkpoint given: the model starts from its initialization")
            return {}
        self.logger.info("Loading from %s", path)
        names = self.checkpointables if checkpointables is None else checkpointables
        return self._restore(self._read(path), path, names)

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
        return comm.on_main(self._newest_valid)

    def get_all_checkpoint_files(self) -> list[str]:
        """Returns all published checkpoints in `save_dir`, valid or not, newest first."""
        return comm.on_main(lambda: [os.fspath(path) for path in self._ranked()])

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Points to a checkpoint, for people and other programs; only rank 0 calls it.

        A resume does not need the pointer, so a failure to write it is no more than a warning.
        """
        try:
            write_atomically(Path(self.save_dir, run_folder.POINTER), last_filename_basename)
        except OSError as e:
            self.logger.warning("Cannot point to %s: %s", last_filename_basename, str(e))

    def keep_newest(self, file_prefix: str, max_to_keep: int) -> None:
        """Deletes all `{file_prefix}_NNNNNNN.pth` but the newest, whichever process saved them.

        The newest valid one stays in any case. Does nothing on other ranks than 0.
        """
        if not (comm.is_main_process() and self.save_to_disk):
            return
        numbered = re.compile(rf"{re.escape(file_prefix)}_\d{{7,}}\.pth")
        paths = [path for path in self._ranked() if numbered.fullmatch(path.name)]
        surplus = paths[max_to_keep:]
        newest_valid = next(filter(self._is_valid, paths), None) if surplus else None
        for path in reversed(surplus):
            if path != newest_valid:
                self.delete(path)

    def delete(self, name: str | os.PathLike[str]) -> None:
        """Deletes a published checkpoint, as far as it can; only rank 0 calls it.

        Args:
            name: With or without ".pth" and the path of `save_dir`.
        """
        path = Path(self.save_dir, f"{Path(name).name.removesuffix('.pth')}.pth")
        if Path(name).parent not in (Path(), path.parent):
            raise ValueError(f"{os.fspath(name)!r} is not in {self.save_dir!r}, so it is not ours.")
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            self.logger.warning("Cannot delete the old checkpoint %s: %s", path, str(e))

    def mark_finished(self, iteration: int) -> None:
        """Notes that the run came to its end after 0-based `iteration`, its last hooks included."""
        if self.save_dir and self.save_to_disk and comm.is_main_process():
            text = json.dumps({"iteration": iteration}) + "\n"
            try:
                write_atomically(Path(self.save_dir, run_folder.FINISHED), text)
            except OSError as e:
                self.logger.warning("Cannot note that the run is finished: %s", str(e))

    def finished_iteration(self) -> int | None:
        """Returns the iteration after which the run came to its end, or None."""
        folder = Path(self.save_dir)
        return comm.on_main(lambda: run_folder.read_finished(folder) if self.save_dir else None)

    def clear_finished(self) -> None:
        """Notes that the run goes on."""
        if self.save_dir:
            marker = Path(self.save_dir, run_folder.FINISHED)
            comm.on_main(lambda: marker.unlink(missing_ok=True) if self.save_to_disk else None)

    def _write(self, name: str, data: dict[str, Any]) -> None:
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
                facts=self.facts,
                after_ns=run_folder.newest_time_ns(folder),
            )
            num_bytes, self._saved = path.stat().st_size, run_folder.signature(path)
        seconds = time.perf_counter() - start
        self.logger.info(f"Saved checkpoint to {path}: {num_bytes:,} bytes in {seconds:.2f} s")

    def _ranked(self) -> list[Path]:
        return run_folder.newest_first(Path(self.save_dir)) if self.save_dir else []

    def _newest_valid(self) -> str:
        for path in self._ranked():
            fault = run_folder.find_fault(path)
            if not fault:
                return os.fspath(path)
            self.logger.warning("Skipping the damaged checkpoint %s: %s", path, fault)
        return ""

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
                self._check_is_of_run(checkpoint, path)
            except CheckpointError as e:
                # Its text only: a handler that keeps records would keep the frames of the error.
                fault = str(e)
                self.logger.warning("SKIPPING A CHECKPOINT. %s", fault)
                faults.append(f"  {fault}")
                continue
            self._check_model(checkpoint["model"], path)
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
            local = self._local_path(path)
            if is_own and leads_out(local):
                raise CheckpointError(f"{path} was refused: {run_folder.find_fault(Path(local))}.")
            return find_weights(self._load_file(local), path), read_manifest(local)

        checkpoint, self.loaded_manifest = comm.together(read)
        return checkpoint

    def _local_path(self, path: str) -> str:
        local = os.fspath(path)
        if not os.path.isfile(local):
            try:
                local = self.path_manager.get_local_path(path)
            except (OSError, ValueError, HTTPException) as e:
                raise CheckpointError(
                    f"Cannot fetch checkpoint {path!r}: {e}. Check the address and the network, or "
                    "download the file and give its path."
                ) from e
        if not os.path.isfile(local):
            raise CheckpointError(run_folder.describe_missing(path))
        return local

    def _load_file(self, f: str) -> dict[str, Any]:
        """Verifies and loads a local file; a subclass may read other formats.

        Returns:
            A dict with "model" or "state_dict", or of weights alone.
        """
        if f.endswith(".safetensors"):
            return load_safetensors(f)
        return cast(dict[str, Any], load_checkpoint(f, trust_pickle=self._may_run_code))

    def _check_is_of_run(self, checkpoint: dict[str, Any], path: str) -> None:
        missing = [name for name in self.checkpointables if name not in checkpoint]
        if missing:
            raise CheckpointError(
                f"{path} holds no state of {', '.join(missing)}, so the run cannot go on from it. "
                f"{_TRANSFER}"
            )

    def _check_model(self, state: dict[str, Any], path: str) -> None:
        own = self.model.state_dict()
        align_names(state, own)
        found = differences(state, own)
        if found:
            raise CheckpointError(
                f"{path} is of another model, so the run cannot go on from it, and nothing was "
                f"loaded:\n{tabulate_differences(found)}\nTo go on with that run, use its config. "
                f"{_TRANSFER}"
            )

    def _restore(
        self, checkpoint: dict[str, Any], path: str, names: Iterable[str]
    ) -> dict[str, Any]:
        with _naming("the model", path):
            incompatible = self._load_model(checkpoint)
        # Subclasses written for fvcore may return nothing.
        if incompatible is not None:
            self._log_incompatible_keys(incompatible)
        for name in names:
            if name not in checkpoint:
                self.logger.warning("%s has no state of %s, which stays as it is", path, name)
                continue
            with _naming(name, path):
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        """Loads what fits; a subclass may change `checkpoint["model"]` first.

        Raises:
            CheckpointError: If nothing fits; the model is untouched then.
        """
        return load_what_fits(self.model, checkpoint.pop("model"))

    def _log_incompatible_keys(self, incompatible: _IncompatibleKeys) -> None:
        """Reports what was not loaded, in one warning."""
        found = list_incompatible(self.model, incompatible)
        if found:
            self.logger.warning(
                "What fits the model was loaded. The rest was not:\n%s", tabulate_differences(found)
            )
