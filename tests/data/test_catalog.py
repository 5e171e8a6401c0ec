from collections.abc import Iterator

import pytest

from trainkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from trainkit.utils.errors import ConfigError, UnknownNameError

NAME = "catalog_test_digits"


@pytest.fixture(autouse=True)
def _forget_the_name() -> Iterator[None]:
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        if NAME in catalog:
            catalog.remove(NAME)


def test_get_calls_the_function_each_time() -> None:
    calls: list[int] = []

    def make() -> list[str]:
        calls.append(1)
        return ["sample"]

    DatasetCatalog.register(NAME, make)
    assert calls == []
    assert DatasetCatalog.get(NAME) == ["sample"]
    DatasetCatalog.get(NAME)
    assert calls == [1, 1]


def test_registered_names_are_listed_and_removed() -> None:
    DatasetCatalog.register(NAME, list)
    assert NAME in DatasetCatalog
    assert NAME in DatasetCatalog.list()
    assert len(DatasetCatalog) == len(DatasetCatalog.list())
    assert NAME in repr(DatasetCatalog)
    assert DatasetCatalog.pop(NAME) is list
    assert NAME not in DatasetCatalog


def test_a_second_registration_is_refused() -> None:
    DatasetCatalog.register(NAME, list)
    with pytest.raises(ConfigError, match=f"'{NAME}' is already registered"):
        DatasetCatalog.register(NAME, dict)
    assert DatasetCatalog.get(NAME) == []


def test_only_functions_can_be_registered() -> None:
    with pytest.raises(ConfigError, match="was registered with a list"):
        DatasetCatalog.register(NAME, [1, 2])  # type: ignore[arg-type]  # The mistake under test.


def test_an_unknown_data_set_gets_the_nearest_name() -> None:
    DatasetCatalog.register(NAME, list)
    for ask in (DatasetCatalog.get, DatasetCatalog.remove, DatasetCatalog.pop):
        with pytest.raises(UnknownNameError, match=f"Did you mean '{NAME}'"):
            ask("catalog_test_digit")


def test_metadata_is_kept_per_data_set() -> None:
    MetadataCatalog.get(NAME).set(classes=["a", "b"], thing=1)
    assert MetadataCatalog.get(NAME).classes == ["a", "b"]
    assert MetadataCatalog.get(NAME).as_dict() == {
        "name": NAME,
        "classes": ["a", "b"],
        "thing": 1,
    }
    assert NAME in MetadataCatalog.list()
    assert NAME in repr(MetadataCatalog)
    assert len(MetadataCatalog) == len(list(MetadataCatalog))
    assert MetadataCatalog.pop(NAME).name == NAME
    assert NAME not in MetadataCatalog


def test_unknown_metadata_cannot_be_removed() -> None:
    with pytest.raises(UnknownNameError, match="metadata of data set"):
        MetadataCatalog.remove("no_such_data_set")


def test_metadata_is_written_once() -> None:
    metadata = Metadata(NAME)
    metadata.classes = ["a"]
    metadata.classes = ["a"]
    with pytest.raises(ConfigError, match=r"already has 'classes' = \['a'\]"):
        metadata.classes = ["b"]
    with pytest.raises(ConfigError, match="already has 'name'"):
        metadata.set(name="other")
    assert metadata.as_dict() == {"name": NAME, "classes": ["a"]}


def test_missing_metadata_names_what_there_is() -> None:
    metadata = Metadata(NAME).set(classes=["a"])
    assert metadata.get("colors", "none") == "none"
    assert not hasattr(metadata, "colors")
    with pytest.raises(AttributeError, match=r"no 'clases'. Did you mean 'classes'"):
        _ = metadata.clases
    assert repr(metadata) == f"Metadata({{'name': '{NAME}', 'classes': ['a']}})"
