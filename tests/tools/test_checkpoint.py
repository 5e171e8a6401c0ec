import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tools.checkpoint import describe, describe_age, leaves, main, show, to_safetensors
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.checkpoint.format import load_safetensors, write_checkpoint
from trainkit.utils.errors import CheckpointError

TRAINER: dict[str, Any] = {
    "iteration": 7,
    "pending": ["EvalHook", "PeriodicWriter"],
    "max_iter": 10,
    "hooks": {"LRScheduler": {"base_lrs": [0.1, 0.2]}, "BestCheckpointer": {"best": None}},
    "optimizer": {"state": {0: {"momentum_buffer": torch.full((2, 2), 3.0)}}, "param_groups": []},
    "data": [
        {"loader": {"seed": 3, "epoch": 2, "offset": 80}},
        {"epoch": 1, "num_consumed": 5, "epoch_rng": {"torch": torch.zeros(9)}},
    ],
    "seed": 3,
}


class State:
    def state_dict(self) -> dict[str, Any]:
        return TRAINER


def fill(folder: Path, names: tuple[str, ...] = ("model_0000003", "model_0000007")) -> Path:
    checkpointer = Checkpointer(nn.Linear(2, 3), folder, trainer=State())
    checkpointer.facts["optimizer"] = "fused"
    for name in names:
        checkpointer.save(name, iteration=int(name[-1]))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill(tmp_path / "run")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Runs the tool, which must fail with one line on stderr."""
    with pytest.raises(SystemExit) as raised:
        main([str(arg) for arg in argv])
    assert raised.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def rows(text: str) -> list[list[str]]:
    """Returns the cells of a table's rows."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    widths = [len(dashes) for dashes in lines[start].split()]
    cells = []
    for line in lines[start + 1 :]:
        at, row = 0, []
        for width in widths[:-1]:
            row.append(line[at : at + width].strip())
            at += width + 2
        cells.append([*row, line[at:].strip()])
    return cells


def test_a_run_is_listed_newest_first_with_what_a_resume_takes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", str(run)]) == 0
    output = capsys.readouterr().out
    first, second, _ = rows(output)
    size = f"{(run / 'model_0000007.pth').stat().st_size:,}"
    assert first[:3] == ["model_0000007.pth", "7", size]
    assert first[3].endswith(" s")
    assert (first[4], second[0], second[1]) == ("verified", "model_0000003.pth", "3")
    assert output.splitlines()[0] == str(run)
    assert output.splitlines()[-1] == (
        "A resume takes model_0000007.pth. last_checkpoint names model_0000007.pth."
    )


def test_what_is_damaged_or_foreign_is_listed_with_the_reason(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "model_0000007.pth")
    torch.save({}, run / "old.pth")
    (run / "outside.pth").symlink_to(fill(run.parent / "other") / "model_0000003.pth")
    (run / "last_checkpoint").write_text("gone.pth\n")
    assert main(["ls", str(run)]) == 0
    output = capsys.readouterr().out
    validity = {row[0]: row[4] for row in rows(output)[:-1]}
    assert validity["model_0000007.pth"].startswith("damaged: its bytes are not those that were")
    assert validity["model_0000003.pth"] == "verified"
    assert validity["old.pth"] == "unverified"
    assert validity["outside.pth"].startswith("refused: it is a link ")
    assert output.splitlines()[-1] == (
        "A resume takes model_0000003.pth. last_checkpoint names 'gone.pth', which is not there."
    )


def test_a_fast_list_does_not_hash(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "model_0000007.pth")
    cut = run / "model_0000003.pth"
    cut.write_bytes(cut.read_bytes()[:-1])
    torch.save({}, run / "old.pth")
    assert main(["ls", "--fast", str(run)]) == 0
    validity = {row[0]: row[4] for row in rows(capsys.readouterr().out)[:-1]}
    assert validity["model_0000007.pth"] == "not hashed"
    assert validity["model_0000003.pth"].startswith("damaged: ")
    assert validity["old.pth"] == "unverified"


def test_a_folder_in_which_nothing_is_valid_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in run.glob("*.pth"):
        damage(path)
    (run / "last_checkpoint").unlink()
    assert main(["ls", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "NONE CAN BE RESUMED FROM. There is no last_checkpoint."


def test_several_folders_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = fill(run.parent / "other", ("model_0000001",))
    assert main(["ls", str(run), str(other)]) == 0
    output = capsys.readouterr().out
    assert output.count("A resume takes") == 2
    assert str(other) in output.splitlines()


def test_folders_without_checkpoints_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tmp_path / "none"
    assert f"There is no folder '{none}'" in error_of(capsys, "ls", none)
    assert "There is no checkpoint (.pth) in" in error_of(capsys, "ls", tmp_path)
    assert "There is no checkpoint (.pth) in" in error_of(capsys, "verify", tmp_path)


def test_an_age_has_its_largest_unit() -> None:
    seconds = (-5, 0, 59, 60, 7200, 86_400 * 3)
    assert [describe_age(s) for s in seconds] == ["0 s", "0 s", "59 s", "1 min", "2 h", "3 d"]


def test_the_age_is_the_manifests(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint({}, run / "z.pth", after_ns=time.time_ns() + 10**15)
    os.utime(run / "z.pth", (0, 0))
    assert main(["ls", str(run)]) == 0
    assert rows(capsys.readouterr().out)[0][3] == "0 s"


def test_verification_tells_which_are_damaged_and_why(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run), str(run / "model_0000003.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [f"{run / 'model_0000003.pth'}: verified"] * 2
    damage(run / "model_0000007.pth")
    assert main(["verify", str(run)]) == 1
    assert main(["verify", str(run / "model_0000003.pth")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        f"{run / 'model_0000007.pth'}: DAMAGED: its bytes are not those that were written "
        "(SHA-256 differs)"
    )


def test_a_link_that_is_named_is_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link.pth").symlink_to(run / "model_0000003.pth")
    assert main(["verify", str(tmp_path / "link.pth")]) == 0
    assert main(["verify", str(tmp_path)]) == 1


@pytest.mark.parametrize("command", ["verify", "show", "export"])
def test_a_missing_file_names_the_nearest(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    error = error_of(capsys, command, run / "modle_0000003.pth")
    assert f"Did you mean '{run / 'model_0000003.pth'}'?" in error


def test_a_file_is_shown_with_norms_facts_and_where_the_run_stands(run: Path) -> None:
    head, table = show(run / "model_0000007.pth").split("\n\n")
    facts = dict(line.split("  ", 1) for line in head.splitlines())
    facts = {name: text.strip() for name, text in facts.items()}
    assert facts["state"] == "verified"
    assert facts["iteration"] == "7"
    assert facts["world size"] == "1"
    assert facts["optimizer"] == "fused"
    assert f"torch {torch.__version__}" in facts["versions"]
    assert len(facts["SHA-256"].split()[0]) == 64
    assert facts["last iteration"] == "7 (from 0) of 10"
    assert facts["hooks yet to run"] == "EvalHook, PeriodicWriter"
    assert facts["seed"] == "3"
    assert facts["data of rank 0"] == "seed 3, epoch 2, offset 80"
    assert facts["data of rank 1"] == "epoch 1, num_consumed 5"
    shown = {row[0]: row[1:] for row in rows(table)}
    assert shown["trainer.optimizer.state.0.momentum_buffer"] == ["float32 (2, 2)", "6"]
    assert shown["trainer.hooks.LRScheduler.base_lrs"] == ["[0.1, 0.2]", ""]
    assert shown["trainer.hooks.BestCheckpointer.best"] == ["None", ""]
    weight = torch.load(run / "model_0000007.pth")["model"]["weight"]
    assert shown["model.weight"][0] == "float32 (3, 2)"
    assert float(shown["model.weight"][1]) == pytest.approx(weight.double().norm().item(), 1e-9)


def test_keys_are_filtered_by_an_expression(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "model_0000007.pth"
    assert main(["show", str(path), "--filter", r"^model\.b|best$"]) == 0
    keys = [row[0] for row in rows(capsys.readouterr().out)]
    assert keys == ["model.bias", "trainer.hooks.BestCheckpointer.best"]
    assert "No key in" in error_of(capsys, "show", path, "--filter", "zzz")
    assert "is no regular expression" in error_of(capsys, "show", path, "--filter", "(")


def test_files_of_others_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {}, "trainer": {"odd": 1}, "iteration": 3}, tmp_path / "old.pth")
    assert main(["show", str(tmp_path / "old.pth")]) == 0
    output = capsys.readouterr().out
    assert "unverified: it has no manifest" in output
    assert "last iteration    None (from 0) of None" in output


def test_a_damaged_file_is_neither_shown_nor_exported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "model_0000007.pth"
    damage(path)
    assert "is damaged: its bytes" in error_of(capsys, "show", path)
    assert "is damaged: its bytes" in error_of(capsys, "export", path)
    assert not list(run.glob("*weights*"))


def test_norms_of_any_dtype_are_those_in_float64() -> None:
    assert describe(torch.tensor([3, 4])) == ("int64 (2,)", "5")
    assert describe(torch.tensor([True, False])) == ("bool (2,)", "1")
    assert describe(torch.tensor([3j, 4.0])) == ("complex64 (2,)", "5")
    # In float16 the sum of squares overflows.
    assert describe(torch.full((4,), 60_000, dtype=torch.float16))[1] == "120000"
    assert describe(torch.tensor([float("nan")]))[1] == "nan"
    assert describe(torch.zeros(0))[1] == "0"
    assert describe(torch.eye(2).to_sparse())[1] == "?"


def test_plain_values_are_shown_in_short() -> None:
    text, norm = describe("x" * 1000)
    assert (len(text), norm) == (61, "")
    data = {"a": [1, {"b": (2, 3)}, torch.ones(1)], "c": {}, "d": []}
    assert [key for key, _ in leaves(data)] == ["a[0]", "a[1].b", "a[2]", "c", "d"]


def load_into_model(path: Path) -> dict[str, torch.Tensor]:
    """Returns a model's weights after it was given a file as MODEL.WEIGHTS."""
    model = nn.Linear(2, 3)
    Checkpointer(model).resume_or_load(str(path), resume=False)
    return dict(model.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_exported_weights_are_those_of_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    source, output = run / "model_0000007.pth", tmp_path / f"x{suffix}"
    assert main(["export", str(source), str(output)]) == 0
    content = output.read_bytes()
    assert capsys.readouterr().out.splitlines() == [
        str(output),
        f"{len(content):,} bytes",
        f"SHA-256 {hashlib.sha256(content).hexdigest()}",
    ]
    expected = torch.load(source, weights_only=True)["model"]
    found = load_into_model(output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    if suffix != ".safetensors":
        assert torch.load(output, weights_only=True).keys() == expected.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_lands_beside_the_file_by_default_or_in_a_folder(
    run: Path, tmp_path: Path
) -> None:
    source = str(run / "model_0000007.pth")
    assert main(["export", source]) == 0
    assert main(["export", source, "--format", "safetensors"]) == 0
    assert main(["export", source, str(tmp_path)]) == 0
    for path in (run, tmp_path):
        assert (path / "model_0000007_weights.pth").is_file()
    assert (run / "model_0000007_weights.safetensors").is_file()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_hash_in_the_name_is_torch_hubs(run: Path, tmp_path: Path, suffix: str) -> None:
    source = str(run / "model_0000007.pth")
    for _ in range(2):
        # The same bytes each time.
        assert main(["export", source, str(tmp_path / f"net{suffix}"), "--hash", "--force"]) == 0
    (path,) = tmp_path.glob(f"net*{suffix}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"net-{digest[:8]}{suffix}"
    match = torch.hub.HASH_REGEX.search(path.name)
    assert suffix != ".pth" or (match and digest.startswith(match[1]))


def test_a_file_is_replaced_only_by_force(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = run / "model_0000007.pth", tmp_path / "x.pth"
    output.write_text("mine")
    assert "Pass --force to replace it" in error_of(capsys, "export", source, output)
    assert output.read_text() == "mine"
    assert main(["export", str(source), str(output), "--force"]) == 0
    assert load_into_model(output)
    before = source.read_bytes()
    (tmp_path / "same.pth").symlink_to(source)
    for same in (source, tmp_path / "same.pth"):
        assert "Name another file" in error_of(capsys, "export", source, same, "--force")
    assert source.read_bytes() == before


def test_outputs_that_make_no_sense_are_errors(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run / "model_0000007.pth"
    error = error_of(capsys, "export", source, tmp_path / "x.bin")
    assert "ends with none of .pth, .pt, .safetensors" in error
    error = error_of(capsys, "export", source, tmp_path / "x.pth", "--format", "safetensors")
    assert "ends like a file of --format pth, not safetensors" in error
    error = error_of(capsys, "export", source, tmp_path / "none" / "x.pth")
    assert f"of {tmp_path / 'none' / 'x.pth'}: No such file or directory. Free there: " in error
    torch.save({"iteration": 3}, tmp_path / "bare.pth")
    assert "holds no weights" in error_of(capsys, "export", tmp_path / "bare.pth")


def test_tensors_that_share_memory_or_are_not_contiguous_are_exported_whole() -> None:
    whole = torch.arange(12.0)
    weights = {"a": whole, "b": whole, "part": whole[3:6], "turned": whole.view(3, 4).t()}
    weights["last"] = torch.rand(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    exported = safetensors.torch.load(to_safetensors(weights))
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


@pytest.mark.parametrize("value", [{"a": 1}, torch.eye(2).to_sparse()])
def test_what_safetensors_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"head\._extra_state is .*Export as \.pth"):
        to_safetensors({"w": torch.ones(1), "head._extra_state": value})


def test_a_missing_package_is_answered_with_the_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    error = error_of(capsys, "export", run / "model_0000007.pth", "--format", "safetensors")
    assert "pip install 'trainkit[safetensors]'" in error


def test_safetensors_are_shown_and_converted(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    assert main(["export", str(run / "model_0000007.pth"), str(output)]) == 0
    assert "float32 (3, 2)" in show(output, "weight")
    assert main(["export", str(output), str(tmp_path / "y.pth")]) == 0
    loaded = torch.load(tmp_path / "y.pth", weights_only=True)
    assert torch.equal(loaded["weight"], load_safetensors(output)["weight"])


@pytest.mark.slow
def test_as_a_program_it_exits_with_1_and_one_line(run: Path) -> None:
    damage(run / "model_0000007.pth")
    program = Path(__file__).parents[2] / "tools" / "checkpoint.py"
    command = [sys.executable, str(program), "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[0].startswith(f"{run / 'model_0000007.pth'}: DAMAGED: ")
    command[-1] = str(run / "none")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("CheckpointError: There is no checkpoint")
    assert done.stderr.count("\n") == 1
