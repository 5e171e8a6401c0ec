import pickle

import pytest

from trainkit.utils.errors import (
    USER_ERRORS,
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    UnknownNameError,
    nearest_name,
)


def test_unknown_name_error_tells_the_nearest_and_all_known_names() -> None:
    error = UnknownNameError("model", "resnt", ["VGG", "ResNet"])
    assert str(error) == "Unknown model 'resnt'. Did you mean 'ResNet'? Known: ResNet, VGG."


def test_unknown_name_error_makes_no_guess_when_nothing_is_near() -> None:
    assert (
        str(UnknownNameError("model", "xyz", ["ResNet"])) == "Unknown model 'xyz'. Known: ResNet."
    )


def test_unknown_name_error_says_when_nothing_is_known() -> None:
    assert str(UnknownNameError("model", "x", [])) == "Unknown model 'x'. Known: none."


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("text"),
        CheckpointError("text"),
        CheckpointWriteError("text"),
        UnknownNameError("model", "x", iter(["y", "z"])),
    ],
)
def test_user_errors_survive_pickling_between_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert isinstance(copy, USER_ERRORS)


@pytest.mark.parametrize(
    ("name", "nearest"), [("sgd", "SGD"), ("adamw", "AdamW"), ("Adm", "Adam"), ("lbfgs", None)]
)
def test_nearest_name_ignores_case_and_rejects_strangers(name: str, nearest: str | None) -> None:
    assert nearest_name(name, ["SGD", "Adam", "AdamW"]) == nearest
