import pytest

from trainkit.utils import testing
from trainkit.utils.testing import min_torch_version


@pytest.mark.parametrize(
    ("needed", "is_there"),
    [("2.6", True), ("2.10", True), ("2.10.7", True), ("2.11", False), ("2.9", True), ("3", False)],
)
def test_versions_compare_as_numbers(
    needed: str, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "TORCH_VERSION", (2, 10))
    assert min_torch_version(needed) is is_there
