"""`make lint`: no Python file over 400 lines, no __init__.py in the five folders."""

import subprocess
import sys
from pathlib import Path

LIMIT = 400
FOLDERS = ("kernels", "model", "launcher", "data_pipeline", "configs")


def faults(root: Path) -> list[str]:
    """What breaks the rules among the files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    found = []
    for name in listed:
        path = root / name
        if not path.is_file():
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LIMIT:
            found.append(f"{name}: {lines} lines; split it, {LIMIT} is the limit")
        if path.name == "__init__.py" and path.parent in [root / folder for folder in FOLDERS]:
            found.append(f"{name}: the five folders are namespace packages; remove it")
    return found


if __name__ == "__main__":
    problems = faults(Path(__file__).resolve().parent.parent)
    print("\n".join(problems) or "file sizes ok")
    sys.exit(1 if problems else 0)
