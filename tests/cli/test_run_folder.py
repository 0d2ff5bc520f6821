"""The folders of runs."""

import os
from pathlib import Path

import pytest

from cli.run_folder import check_folder, make_run_dir, tidy_run_dir
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
    assert make_run_dir(str(folders[0] / "other.yaml"), "same").parent == Path("runs/other")
    assert make_run_dir("configs/config.yaml", "same").parent == Path("runs/config")  # not that of a run


def test_a_folder_beneath_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make a folder for the run: Not a directory"):
        make_run_dir(None, "same", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot make a folder for the run: .*/file is not a folder"):
        make_run_dir("file.yaml", "same", str(tmp_path))
    with pytest.raises(UserError, match=r"data.x: cannot make the folder .*/file/deep/er, for .*/file is a file"):
        check_folder(tmp_path / "file" / "deep" / "er", "data.x")
    check_folder(tmp_path / "deep" / "er", "data.x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write everywhere
    with pytest.raises(UserError, match=r"data.x: no permission to write into"):
        check_folder(tmp_path / "deep", "data.x")


def test_a_folder_beneath_one_that_cannot_be_entered_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may enter every folder
        with pytest.raises(UserError, match=r"data.x: (no permission to|cannot) write into"):
            check_folder(tmp_path / "closed" / "deep", "data.x")
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize(("file", "stays"), [("config.yaml", False), ("checkpoints/last.ckpt", True)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_failed_run_leaves_nothing_but_checkpoints(tmp_path, monkeypatch, file, stays, beside):
    monkeypatch.chdir(tmp_path)
    folder = make_run_dir("configs/a.yaml", "x")
    if beside:
        make_run_dir("configs/b.yaml", "x")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    tidy_run_dir(folder, failed=False)
    assert (folder / file).exists()
    tidy_run_dir(folder, failed=True)
    assert (folder / file).exists() == stays
    assert Path("runs/a").exists() == stays
    assert Path("runs").exists() == (stays or beside)


def test_an_empty_folder_of_a_run_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tidy_run_dir(make_run_dir("configs/a.yaml", "x"), failed=False)
    assert not Path("runs").exists()
