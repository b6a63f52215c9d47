"""Every field of every settings dataclass is read: an option that does nothing is a lie."""

import ast
import dataclasses
from pathlib import Path

import pytest

import fedfora

SOURCE = Path(fedfora.__file__).parent


def settings_classes(tree):
    """Dataclasses with at least one field made by `flag`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names = [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.value, ast.Call)
                and getattr(item.value.func, "id", "") == "flag"
            ]
            if names:
                yield node, names


def read_names(tree):
    """Names read as attributes, outside a settings class's own checks of itself."""
    own = {
        id(inner)
        for node, _ in settings_classes(tree)
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
        for inner in ast.walk(function)
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and id(node) not in own
    }


def parsed():
    return [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")]


def test_every_field_of_every_settings_dataclass_is_read():
    trees = parsed()
    read = set().union(*map(read_names, trees))
    fields = {
        (node.name, n) for tree in trees for node, names in settings_classes(tree) for n in names
    }
    assert len(fields) > 40
    unread = {f"{owner}.{name}" for owner, name in fields if name not in read}
    assert sorted(unread) == []


def test_the_check_sees_a_field_that_nothing_reads():
    tree = ast.parse(
        "@dataclass\n"
        "class A:\n"
        "    used: int = flag(1, '')\n"
        "    only_checked: int = flag(1, '')\n"
        "    def __post_init__(self):\n"
        "        assert self.only_checked and self.used\n"
        "print(settings.used)\n"
    )
    ((_, names),) = settings_classes(tree)
    assert [name for name in names if name not in read_names(tree)] == ["only_checked"]


@pytest.mark.parametrize("module", ["training.settings", "federated.settings"])
def test_sections_are_dataclasses_of_flags(module):
    from importlib import import_module

    for section in import_module(f"fedfora.{module}").SECTIONS.values():
        assert all("help" in field.metadata for field in dataclasses.fields(section))
