"""Lists, verifies, shows and exports checkpoints.

    python tools/checkpoint.py ls output              which are there, and which a resume takes
    python tools/checkpoint.py verify output          exit code 1 if one is damaged
    python tools/checkpoint.py show output/model_final.pth --filter lr$
    python tools/checkpoint.py export output/model_final.pth model.safetensors --hash

What is exported are the weights alone, as a state_dict; MODEL.WEIGHTS takes them. Nothing that is
read runs code. Files in the format of safetensors need the extra `safetensors`.
"""

import argparse
import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from trainkit.checkpoint import folder as run_folder
from trainkit.checkpoint.format import load_checkpoint, load_safetensors, verify
from trainkit.checkpoint.manifest import DamagedError, Manifest, read_end, read_manifest
from trainkit.checkpoint.matching import find_weights
from trainkit.checkpoint.space import free_bytes
from trainkit.engine import exit_codes
from trainkit.utils.errors import CheckpointError, ConfigError
from trainkit.utils.file_io import leads_out, publish

FORMATS = {".pth": "pth", ".pt": "pth", ".safetensors": "safetensors"}
UNITS = (("d", 86_400), ("h", 3600), ("min", 60))
# Hexadecimal digits of the SHA-256 in a name, as torch.hub has them.
HASH_DIGITS = 8
MAX_TEXT = 60


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints of a folder, the one to resume from first.

    Raises:
        CheckpointError: If there is no such folder, or no checkpoint in it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {os.fspath(folder)!r}.")
    paths = run_folder.newest_first(folder)
    if not paths:
        raise CheckpointError(f"There is no checkpoint (.pth) in {os.fspath(folder)!r}.")
    return paths


def judge(path: Path, fast: bool = False) -> tuple[str, str]:
    """Returns what a checkpoint is, and what is wrong with it if it cannot be used.

    Args:
        path: The file.
        fast: Whether to look at its end only, and not to hash it.
    """
    if leads_out(path):
        return "refused", run_folder.find_fault(path)
    if not fast:
        verdict = verify(path)
        return verdict.state, verdict.reason
    try:
        return ("not hashed" if read_end(path).manifest else "unverified"), ""
    except (DamagedError, OSError) as e:
        return "damaged", str(e)


def describe_age(seconds: float) -> str:
    """Returns a time in its largest fitting unit, such as "3 h"."""
    for unit, length in UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def list_folder(folder: Path, fast: bool = False) -> str:
    """Returns a table of a folder's checkpoints, and what a resume takes.

    Raises:
        CheckpointError: If there is nothing to list.
    """
    rows, taken = [], ""
    for path in checkpoints_in(folder):
        state, reason = judge(path, fast)
        manifest = read_manifest(path)
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue  # A run that goes on has deleted it meanwhile.
        taken = taken or ("" if reason else path.name)
        iteration = "" if manifest is None or manifest.iteration is None else manifest.iteration
        saved_at = manifest.saved_at_ns / 1e9 if manifest else stat.st_mtime
        age = describe_age(time.time() - saved_at)
        validity = f"{state}: {reason}" if reason else state
        rows.append((path.name, iteration, f"{stat.st_size:,}", age, validity))
    table = tabulate(
        rows,
        headers=("name", "iteration", "bytes", "age", "validity"),
        colalign=("left", "right", "right", "right", "left"),
        disable_numparse=True,
    )
    resume = f"A resume takes {taken}." if taken else "NONE CAN BE RESUMED FROM."
    return f"{folder}\n{table}\n{resume} {_describe_pointer(folder)}"


def _describe_pointer(folder: Path) -> str:
    pointer = folder / run_folder.POINTER
    if not pointer.is_file():
        return f"There is no {run_folder.POINTER}."
    with pointer.open("rb") as file:
        name = file.read(4 * MAX_TEXT).decode("utf-8", "replace").strip()
    is_there = os.path.basename(name) == name and (folder / name).is_file()
    missing = "" if is_there else ", which is not there"
    return f"{run_folder.POINTER} names {name if is_there else repr(name)}{missing}."


def verify_all(paths: list[Path]) -> bool:
    """Prints a line on each file, and on each checkpoint of each folder.

    Returns:
        Whether none is damaged.

    Raises:
        CheckpointError: If a path leads to nothing.
    """
    is_sound = True
    for path in paths:
        for found in checkpoints_in(path) if path.is_dir() else [path]:
            _check_is_file(found)
            # A link that the user names is followed; one in a run's folder must not lead out of it.
            state, reason = judge(found if path.is_dir() else Path(os.path.realpath(found)))
            print(f"{found}: {state.upper()}: {reason}" if reason else f"{found}: {state}")
            is_sound = is_sound and not reason
    return is_sound


def load_file(path: Path) -> Any:
    """Loads a checkpoint, or a file of safetensors.

    Raises:
        CheckpointError: If it is missing, damaged, or would run code.
    """
    _check_is_file(path)
    return load_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(run_folder.describe_missing(os.fspath(path)))


def leaves(data: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields tensors and plain values, those lists whole that hold nothing else, with their paths.

    Args:
        data: Any nesting of dicts, lists and tuples.
        path: Where it is.
        above: The ids of what it lies in; what lies in itself is passed over.
    """
    if id(data) in above:
        return
    above = (*above, id(data))
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key), above)
    elif isinstance(data, (list, tuple)) and any(
        isinstance(value, (dict, list, tuple, torch.Tensor)) for value in data
    ):
        for index, value in enumerate(data):
            yield from leaves(value, f"{path}[{index}]", above)
    else:
        yield path, data


def describe(value: Any) -> tuple[str, str]:
    """Returns dtype and shape of a tensor, and its 2-norm in float64; or a plain value, and ""."""
    if not isinstance(value, torch.Tensor):
        text = repr(value)
        return (text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"), ""
    name = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    try:
        dtype = torch.complex128 if value.is_complex() else torch.float64
        return name, f"{torch.linalg.vector_norm(value.detach().to(dtype)).item():.10g}"
    except (RuntimeError, NotImplementedError):
        # Sparse and quantized ones have their own arithmetic, or none.
        return name, "?"


def show(path: Path, pattern: str = "") -> str:
    """Returns what a checkpoint says of itself, where its run stands, and what it holds.

    Args:
        path: The file.
        pattern: Regular expression of the keys to show; all by default.

    Raises:
        CheckpointError: If it cannot be loaded.
        ConfigError: If the pattern is none, or no key matches it.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"--filter {pattern!r} is no regular expression: {e}.") from None
    data = load_file(path)
    found = [(key, *describe(value)) for key, value in leaves(data) if wanted.search(key)]
    if not found:
        raise ConfigError(f"No key in {path} matches --filter {pattern!r}.")
    facts = {"file": f"{path}, {path.stat().st_size:,} bytes", **_facts(read_manifest(path))}
    trainer = data.get("trainer") if isinstance(data, dict) else None
    run = summarize_run(trainer) if isinstance(trainer, dict) else {}
    head = tabulate((facts | run).items(), tablefmt="plain", disable_numparse=True)
    rows = tabulate(found, ("key", "value", "norm"), disable_numparse=True)
    return f"{head}\n\n{rows}"


def _facts(manifest: Manifest | None) -> dict[str, str]:
    if manifest is None:
        return {"state": "unverified: it has no manifest"}
    saved_at = datetime.fromtimestamp(manifest.saved_at_ns / 1e9).astimezone()
    return {
        "state": "verified",
        "SHA-256": f"{manifest.sha256} (of the bytes before the manifest)",
        "saved": saved_at.isoformat(" ", "seconds"),
        "iteration": str(manifest.iteration),
        "world size": str(manifest.world_size),
        "versions": ", ".join(f"{name} {v}" for name, v in manifest.versions.items()),
        **{name: str(value) for name, value in manifest.facts.items()},
    }


def summarize_run(trainer: dict[str, Any]) -> dict[str, str]:
    """Returns where a run stands, from the state of its trainer."""
    summary = {
        "last iteration": f"{trainer.get('iteration')} (from 0) of {trainer.get('max_iter')}",
        "hooks yet to run": ", ".join(map(str, trainer.get("pending") or ["none"])),
        "seed": str(trainer.get("seed")),
    }
    for rank, state in enumerate(trainer.get("data") or []):
        # The states of generators are no position.
        position = [
            f"{key.rpartition('.')[2]} {value}"
            for key, value in leaves(state)
            if isinstance(value, (int, str))
        ]
        summary[f"data of rank {rank}"] = ", ".join(position)
    return summary


def export(
    source: Path,
    output: Path | None = None,
    *,
    file_format: str | None = None,
    with_hash: bool = False,
    force: bool = False,
) -> Path:
    """Writes the weights of a checkpoint into a file of their own, which appears whole.

    Args:
        source: The checkpoint.
        output: The file, or the folder for it; `<source>_weights` beside the source by default.
        file_format: "pth" or "safetensors"; that of the output's suffix by default.
        with_hash: Whether to put 8 digits of the file's SHA-256 into its name.
        force: Whether to replace a file.

    Returns:
        Where the file is.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded, the format cannot hold its weights, or
            the file cannot be written.
        ConfigError: If the output makes no sense, or is there already.
    """
    output, file_format = _choose_output(source, output, file_format)
    weights = find_weights(load_file(source), os.fspath(source))["model"]
    content = to_safetensors(weights) if file_format == "safetensors" else to_pth(weights)
    digest = hashlib.sha256(content).hexdigest()
    if with_hash:
        output = output.with_name(f"{output.stem}-{digest[:HASH_DIGITS]}{output.suffix}")
    if output.exists() and (not force or output.samefile(source)):
        hint = "Name another file" if output.samefile(source) else "Pass --force to replace it"
        raise ConfigError(f"{output} is there already. {hint}.")
    _write(content, output)
    print(f"{output}\n{len(content):,} bytes\nSHA-256 {digest}")
    return output


def _choose_output(source: Path, output: Path | None, chosen: str | None) -> tuple[Path, str]:
    suffix = f".{chosen or 'pth'}"
    if output is None or output.is_dir():
        output = (output or source.parent) / f"{source.stem}_weights{suffix}"
    found = FORMATS.get(output.suffix)
    if found is None:
        raise ConfigError(f"{output} ends with none of {', '.join(FORMATS)}. Append one of them.")
    if chosen not in (None, found):
        raise ConfigError(f"{output} ends like a file of --format {found}, not {chosen}.")
    return output, found


def to_pth(weights: dict[str, Any]) -> bytes:
    """Returns what `torch.save` makes of a state_dict; the same bytes each time."""
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def to_safetensors(weights: dict[str, Any]) -> bytes:
    """Returns weights in the format of safetensors.

    The format has no shared tensors: those that share memory are stored once for each name.

    Raises:
        CheckpointError: If safetensors is missing, or not all are dense tensors.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise CheckpointError(
            "This needs the package safetensors, which is not installed. Run pip install "
            "'trainkit[safetensors]', or export as .pth."
        ) from None
    tensors, memory = {}, set()
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{key} is {describe(value)[0]}, and safetensors holds dense tensors only. Export "
                "as .pth."
            )
        begin = value.untyped_storage().data_ptr()
        tensors[key] = (value.clone() if begin in memory else value).contiguous()
        memory.add(begin)
    try:
        return save(tensors, {"format": "pt"})
    except Exception as e:
        # Its errors, for a dtype that it has not for one, have no common class.
        raise CheckpointError(f"safetensors cannot hold these weights: {e}") from e


def _write(content: bytes, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, output)
    except OSError as e:
        free = free_bytes(output.parent)
        raise CheckpointError(
            f"Cannot write the {len(content):,} bytes of {output}: {e.strerror or e}. Free there: "
            f"{'unknown' if free is None else f'{free:,}'}."
        ) from e
    finally:
        temporary.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="list the checkpoints of a run")
    ls.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    ls.add_argument("--fast", action="store_true", help="look at their ends only, hash nothing")
    check = commands.add_parser("verify", help="tell which checkpoints are damaged")
    check.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    one = commands.add_parser("show", help="show what a checkpoint holds")
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--filter", default="", metavar="REGEX", help="keys to show; default: all")
    out = commands.add_parser("export", help="write the weights alone")
    out.add_argument("file", type=Path, metavar="FILE")
    out.add_argument("output", nargs="?", type=Path, help="default: FILE_weights beside FILE")
    formats = sorted(set(FORMATS.values()))
    out.add_argument("--format", choices=formats, help="default: by the output's suffix, or pth")
    out.add_argument("--hash", action="store_true", help="put 8 digits of its SHA-256 in its name")
    out.add_argument("--force", action="store_true", help="replace a file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and returns the exit code.

    Raises:
        SystemExit: With code 1 after an error that the user can mend.
    """
    args = build_parser().parse_args(argv)
    with exit_codes():
        if args.command == "ls":
            for folder in args.folders:
                print(list_folder(folder, args.fast))
        elif args.command == "verify":
            return 0 if verify_all(args.paths) else 1
        elif args.command == "show":
            print(show(args.file, args.filter))
        else:
            export(
                args.file,
                args.output,
                file_format=args.format,
                with_hash=args.hash,
                force=args.force,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
