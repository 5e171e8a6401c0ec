"""`Checkpointer`: saves the whole state of a run, and finds the newest that can be trusted."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from tabulate import tabulate
from torch import nn

from trainkit.checkpoint.format import check_storable, load_checkpoint, write_checkpoint
from trainkit.checkpoint.manifest import DamagedCheckpointError, Manifest, read_manifest, verify
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError, nearest_name
from trainkit.utils.file_io import PathManager, publish, write_atomically

logger = logging.getLogger(__name__)

_POINTER = "last_checkpoint"
_FINISHED = "finished.json"
# Rows of a table of keys that do not fit; more would not be read.
_MAX_ROWS = 10


class Checkpointer(_Checkpointer):
    """fvcore's checkpointer, with files that verify themselves and appear whole or not at all.

    Every rank calls its methods; rank 0 writes and decides. Errors are raised on every rank.

    Args:
        model: Unwrapped from DistributedDataParallel and torch.compile.
        save_dir: Folder of the checkpoints; without one, nothing is saved.
        save_to_disk: Whether rank 0 writes.
        checkpointables: Objects with `state_dict` and `load_state_dict`, by name.

    Attributes:
        facts: Plain values for the manifests of coming checkpoints.
        loaded_manifest: The manifest of what was loaded last, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | os.PathLike[str] = "",
        *,
        save_to_disk: bool = True,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, os.fspath(save_dir), save_to_disk=save_to_disk, **checkpointables)
        self.model: nn.Module = getattr(self.model, "_orig_mod", self.model)
        self.logger = logger
        self.path_manager = PathManager
        self.facts: dict[str, str | int | float | bool] = {}
        self.loaded_manifest: Manifest | None = None
        self._must_fit = False
        # What rank 0 has read while it looked for the newest checkpoint that loads.
        self._read: tuple[str, Any] | None = None

    def save(self, name: str, **extra: Any) -> None:
        """Saves model, checkpointables and extra data as `{name}.pth`, and points to it.

        Raises:
            CheckpointError: If something in the state cannot be stored, or the disk refuses; what
                was saved before is intact then.
        """
        if self.save_untagged(name, **extra):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_untagged(self, name: str, **extra: Any) -> bool:
        """Like `save`, but leaves the pointer to the newest checkpoint alone.

        Returns:
            Whether a file was written.
        """
        if not self.save_dir:
            return False
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(extra)
        return comm.on_main(lambda: self._write(name, data))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads what fits into the model, and the checkpointables, from one file.

        Args:
            path: Path or address of the file; an empty one loads nothing.
            checkpointables: Names of those to load; None loads all.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: If the file is missing, damaged, would run code, or fits nowhere.
        """
        if path and not os.path.isfile(path):
            if "://" not in path:
                raise CheckpointError(_missing_message(path))
            path = self.path_manager.get_local_path(path)
        extra: dict[str, Any] = super().load(path, checkpointables)
        return extra

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Goes on from the newest valid checkpoint, or loads the model's weights from `path`.

        Args:
            path: Where weights come from if there is no checkpoint, or none is asked for.
            resume: Whether to look for a checkpoint in `save_dir`. It must fit the model in full.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: If all checkpoints are damaged, or the newest is of another model.
        """
        if not resume or not self.has_checkpoint():
            return self.load(path, checkpointables=[])
        newest = comm.on_main(self._newest_that_loads)
        self._must_fit = True
        try:
            return self.load(newest)
        finally:
            self._must_fit = False
            self._read = None

    def has_checkpoint(self) -> bool:
        """Whether there is any checkpoint file in `save_dir`, valid or not."""
        return bool(self.get_all_checkpoint_files())

    def get_checkpoint_file(self) -> str:
        """Returns the newest valid checkpoint, or "" if there is none; says what it passes over."""
        return comm.on_main(lambda: next((str(path) for path in self._valid()), ""))

    def get_all_checkpoint_files(self) -> list[str]:
        """Returns all published checkpoints in `save_dir`, newest first."""
        return comm.on_main(lambda: [str(path) for path in self._ranked()])

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Points to a checkpoint, for people and other programs: `resume_or_load` looks itself."""
        if comm.is_main_process():
            write_atomically(Path(self.save_dir, _POINTER), last_filename_basename)

    def keep_newest(self, file_prefix: str, max_to_keep: int) -> None:
        """Deletes `{file_prefix}_NNNNNNN.pth` but the newest, whichever process saved them.

        The newest valid checkpoint is never deleted.
        """
        if comm.is_main_process() and self.save_to_disk:
            numbered = re.compile(rf"{re.escape(file_prefix)}_\d+\.pth")
            paths = [path for path in self._ranked() if numbered.fullmatch(path.name)]
            surplus = paths[max_to_keep:]
            newest_valid = next(self._valid(), None) if surplus else None
            for path in surplus:
                if path != newest_valid:
                    path.unlink()

    def mark_finished(self, iteration: int) -> None:
        """Notes that the run came to its end after 0-based `iteration`, its last hooks included."""
        if comm.is_main_process() and self.save_to_disk and self.save_dir:
            write_atomically(
                Path(self.save_dir, _FINISHED), json.dumps({"iteration": iteration}) + "\n"
            )

    def finished_iteration(self) -> int | None:
        """Returns the iteration after which the run came to its end, or None."""
        return comm.on_main(self._read_finished)

    def clear_finished(self) -> None:
        """Notes that the run goes on."""
        if comm.is_main_process():
            Path(self.save_dir, _FINISHED).unlink(missing_ok=True)

    def _write(self, name: str, data: dict[str, Any]) -> bool:
        if not self.save_to_disk:
            return False
        path = Path(self.save_dir, f"{name}.pth")
        if path.parent != Path(self.save_dir):
            raise CheckpointError(f"The checkpoint's name is {name!r}; it cannot name a folder.")
        check_storable(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.pth.tmp"):
            stale.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        iteration = data.get("iteration")
        write_checkpoint(
            data,
            temporary,
            iteration=iteration if isinstance(iteration, int) else None,
            world_size=comm.get_world_size(),
            facts=self.facts,
        )
        try:
            publish(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"The checkpoint {path} was not published: {e.strerror or e}. Earlier checkpoints "
                "are intact; go on with --resume once the disk is."
            ) from e
        logger.info("Saved checkpoint to %s", path)
        return True

    def _ranked(self) -> list[Path]:
        """Returns the published files: those with a manifest by its time, then the others."""
        folder = Path(self.save_dir)
        if not self.save_dir or not folder.is_dir():
            return []
        try:
            pointed_to = (folder / _POINTER).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            pointed_to = ""

        def rank(path: Path) -> tuple[bool, bool, int]:
            try:
                manifest = read_manifest(path)
            except DamagedCheckpointError:
                # In its place by age, to be reported if nothing newer is valid.
                return (True, False, path.stat().st_mtime_ns)
            if manifest is None:
                return (False, path.name == pointed_to, path.stat().st_mtime_ns)
            return (True, False, manifest.saved_at_ns)

        paths = [path for path in folder.glob("*.pth") if path.is_file()]
        return sorted(paths, key=rank, reverse=True)

    def _valid(self) -> Iterator[Path]:
        """Yields the files that verify or cannot be verified, newest first; warns of the others."""
        for path in self._ranked():
            try:
                verify(path)
            except DamagedCheckpointError as e:
                logger.warning("Passing over a damaged checkpoint. %s", e)
            else:
                yield path

    def _newest_that_loads(self) -> str:
        for path in self._ranked():
            try:
                data = self._load_file(str(path))
            except CheckpointError as e:
                logger.warning("Passing over a checkpoint that does not load. %s", e)
                continue
            missing = [key for key in self.checkpointables if key not in data]
            if missing:
                logger.warning("Passing over %s: it has no state of %s.", path, missing)
                continue
            self._read = (str(path), data)
            return str(path)
        raise CheckpointError(
            f"There are checkpoints in {self.save_dir!r}, but none can be used (see the warnings "
            "above). Restore one, or start anew without --resume or in another OUTPUT_DIR."
        )

    def _load_file(self, f: str) -> dict[str, Any]:
        """Loads a verified file into a dict with the key "model"; older and bare files too."""
        if self._read is not None and self._read[0] == f:
            return self._read[1]  # type: ignore[no-any-return]  # what this method returned before
        data, self.loaded_manifest = load_checkpoint(Path(f))
        if not isinstance(data, dict):
            raise CheckpointError(f"{f} holds a {type(data).__name__}, not a dict of weights.")
        if "model" not in data:
            data = {"model": data.get("state_dict", data)}
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = {
            key.replace("_orig_mod.", "").removeprefix("module."): value
            for key, value in checkpoint["model"].items()
        }
        own = self.model.state_dict()
        misfits = _misfits(weights, own)
        if self._must_fit and misfits:
            raise CheckpointError(
                f"The checkpoint in {self.save_dir!r} is of another model:\n{_table(misfits)}\n"
                "Nothing was loaded. To go on with that run, use its config (config.yaml beside "
                "it). To start from its weights, set MODEL.WEIGHTS to the file, drop --resume, and "
                "choose another OUTPUT_DIR."
            )
        if (
            own
            and len(misfits) >= len(own)
            and not any(
                key in own and _shape(value) == _shape(own[key]) for key, value in weights.items()
            )
        ):
            raise CheckpointError(
                f"Nothing in the checkpoint fits the model:\n{_table(misfits)}\n"
                "Check MODEL.WEIGHTS and the model's settings."
            )
        checkpoint["model"] = weights
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        rows = [
            *((key, found, expected) for key, found, expected in incompatible.incorrect_shapes),
            *((key, "missing", "left as it was") for key in incompatible.missing_keys),
            *((key, "not used", "missing") for key in incompatible.unexpected_keys),
        ]
        if rows:
            logger.warning("Weights were loaded where they fit. The rest:\n%s", _table(rows))

    def _read_finished(self) -> int | None:
        path = Path(self.save_dir, _FINISHED)
        if not path.exists():
            return None
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["iteration"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is not readable: taking the run for unfinished.", path)
            return None


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)


def _misfits(weights: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (key, shape in the file, shape in the model) where these differ."""
    rows = []
    for key in [*own, *(key for key in weights if key not in own)]:
        found = _shape(weights[key]) if key in weights else "missing"
        expected = _shape(own[key]) if key in own else "missing"
        if found != expected:
            rows.append((key, found, expected))
    return rows


def _table(rows: list[tuple[str, Any, Any]]) -> str:
    table = tabulate(rows[:_MAX_ROWS], headers=["key", "in the checkpoint", "in the model"])
    surplus = len(rows) - _MAX_ROWS
    return f"{table}\n… and {surplus} more" if surplus > 0 else table


def _missing_message(path: str) -> str:
    folder = Path(path).parent
    if not folder.is_dir():
        return f"There is no checkpoint {path!r}, and no folder {str(folder)!r}. Check the path."
    nearest = nearest_name(Path(path).name, (p.name for p in folder.iterdir()))
    hint = f" Did you mean {str(folder / nearest)!r}?" if nearest else " Check MODEL.WEIGHTS."
    return f"There is no checkpoint {path!r}.{hint}"
