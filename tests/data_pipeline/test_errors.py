from __future__ import annotations

import ast
from pathlib import Path

import haloformer.data_pipeline.errors as errors_module

FOLDER = Path(errors_module.__file__).parent
KINDS = ("DataError", "CorruptSampleError", "RemoteError")


def test_every_data_error_says_what_to_do() -> None:
    """What is only told again, ``DataError(told)``, has its remedy already."""
    calls = [
        (path.name, node)
        for path in sorted(FOLDER.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS
    ]
    silent = [
        f"{name}:{call.lineno}"
        for name, call in calls
        if not isinstance(call.args[0], ast.Name) and all(k.arg != "remedy" for k in call.keywords)
    ]
    assert len(calls) > 50 and silent == []
