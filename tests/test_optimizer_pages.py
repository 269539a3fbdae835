"""The pages of docs/optimizers hold what the registry knows, and cover every name once."""

from __future__ import annotations

import pytest
from optimizer_pages import FOLDER, INDEX, families, index, page, with_facts

import dist_optim

WRITE = "run `make docs` and commit what it writes"


@pytest.mark.parametrize("family", families())
def test_a_page_is_current(family: str) -> None:
    text = (FOLDER / f"{family}.md").read_text()
    assert text == with_facts(text, page(families()[family])), WRITE
    for heading in ("**When.**", "## Limits"):
        assert heading in text


def test_the_index_is_current() -> None:
    assert INDEX.read_text() == with_facts(INDEX.read_text(), index()), WRITE


def test_every_registered_name_is_on_one_page() -> None:
    named = [spec.name for specs in families().values() for spec in specs]
    assert sorted(named) == dist_optim.names()
    assert {path.stem for path in FOLDER.glob("*.md")} == {*families(), "README"}


def test_control_a_changed_default_is_seen() -> None:
    specs = families()["lomo"]
    assert with_facts(INDEX.read_text(), page(specs)) != INDEX.read_text()
    with pytest.raises(ValueError, match="lost the marks"):
        with_facts("no marks", "facts")
