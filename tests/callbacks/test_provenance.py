"""The git state is that of the platform's checkout."""

import subprocess
from pathlib import Path

from callbacks.provenance import git_state


def git(folder: Path, *command: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True)


def test_git_state_is_of_that_checkout_alone(tmp_path):
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert git_state(inside) == {"revision": None, "dirty": None}
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "start")
    assert len(git_state(tmp_path)["revision"]) == 40
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "new.py").touch()
    assert git_state(tmp_path)["dirty"] is True
    assert git_state(inside) == {"revision": None, "dirty": None}
