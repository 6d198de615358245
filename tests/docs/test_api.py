"""The page of the public API names what exists, is documented, and is all there is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from types import ModuleType
from typing import Any

import pytest

from doc_pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "api.md")
_NAME = re.compile(r"^haloformer(?:\.\w+)+\.(\w+)$")
_ROW = re.compile(r"^\| `(haloformer\.[\w.]+)` \|", re.MULTILINE)
ROWS = _ROW.findall(PAGE.text)
NAMES = [span for span in PAGE.spans if _NAME.match(span)]
MODULES = sorted({name.rpartition(".")[0] for name in NAMES})


def named(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def public_names(module: ModuleType) -> set[str]:
    """What a module offers: its ``__all__``, else the classes and functions it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return set(listed)
    found = {name: x for name, x in vars(module).items() if not name.startswith("_")}
    return {
        name
        for name, x in found.items()
        if (inspect.isclass(x) or inspect.isfunction(x)) and x.__module__ == module.__name__
    }


def words_of(what: Any) -> str:
    text = inspect.getdoc(what)
    return "" if text is None else text


def undocumented(function: Any) -> list[str]:
    """Parameters that the docstring does not explain, and a result that it does not."""
    text, signature = words_of(function), inspect.signature(function)
    parameters = [name for name in signature.parameters if name != "self"]
    missing = [name for name in parameters if not re.search(rf"^    {name}: ", text, re.M)]
    returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    return missing + (["Returns:"] if returns and "Returns:" not in text else [])


def fields_of(what: type) -> list[str]:
    """Annotated names in the body of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(what)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_imported_and_has_a_docstring_of_its_own(name):
    found = named(name)
    assert found.__doc__ and words_of(found), name


@pytest.mark.parametrize("name", ROWS)
def test_functions_explain_their_arguments_and_results_and_records_their_fields(name):
    found = named(name)
    if inspect.isfunction(found):
        assert undocumented(found) == []
    elif hasattr(found, "_fields") or hasattr(found, "__dataclass_fields__"):
        source = inspect.getsource(found)
        for field in fields_of(found):
            above = re.search(rf"^ +{field}: ", words_of(found), re.MULTILINE)
            beside = re.search(rf"^    {field}: .*  # ", source, re.MULTILINE)
            assert above or beside, f"{name}.{field}"


@pytest.mark.parametrize("module", MODULES)
def test_no_public_name_of_a_listed_module_is_forgotten(module):
    listed = {name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == module}
    here = public_names(importlib.import_module(module))
    # A name may stand under the module that defines it.
    elsewhere = {name.rpartition(".")[2] for name in NAMES}
    assert here <= listed | (here & elsewhere), here - listed - elsewhere


def test_there_are_rows_and_no_name_twice():
    assert len(ROWS) > 30 and len(NAMES) == len(set(NAMES))
