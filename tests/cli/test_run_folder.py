"""The folders of runs."""

from pathlib import Path

import pytest

from cli.run_folder import check_folder, make_run_dir
from datamodules.errors import UserError


def test_run_folders_never_coincide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [make_run_dir("configs/phase_mqar.yaml", "same") for _ in range(3)]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {Path("runs/phase_mqar")}
    assert make_run_dir(None, "same").parent == Path("runs/adhoc")
    assert folders[0].name.split("-")[2] != make_run_dir("configs/phase_mqar.yaml", "other").name.split("-")[2]
    (folders[0] / "results.json").touch()
    assert make_run_dir(str(folders[0] / "config.yaml"), "same").parent == Path("runs/phase_mqar")


def test_a_folder_beneath_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make a folder for the run"):
        make_run_dir(None, "same", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"data.x: cannot make the folder .*/file/deep/er, for .*/file is a file"):
        check_folder(tmp_path / "file" / "deep" / "er", "data.x")
    check_folder(tmp_path / "deep" / "er", "data.x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write everywhere
    with pytest.raises(UserError, match=r"data.x: no permission to write into"):
        check_folder(tmp_path / "deep", "data.x")
