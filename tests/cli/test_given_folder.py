"""A folder that the user named belongs to one run."""

import pytest

from cli.given_folder import GivenFolder
from datamodules.errors import UserError


def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "mine"
    first = GivenFolder(folder, "data.x")
    with pytest.raises(UserError, match=r"data.x: another run writes into .*mine now"):
        GivenFolder(folder, "data.x")
    first.release()
    second = GivenFolder(folder, "data.x")
    (folder / "config.yaml").touch()
    second.release()
    with pytest.raises(UserError, match=r"data.x: .*mine already holds a run"):
        GivenFolder(folder, "data.x")
    (folder / "config.yaml").unlink()
    third = GivenFolder(folder, "data.x")  # whoever was refused does not hold the folder
    third.release()
    third.release()


def test_a_folder_that_cannot_be_made_leaves_none_of_its_parents(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.x: cannot make the folder .*/file/mine, for .*/file is a file"):
        GivenFolder(tmp_path / "file" / "mine", "data.x")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cli.given_folder.os.open", refuse)
    monkeypatch.setattr("cli.given_folder.check_folder", lambda *_: None)
    with pytest.raises(UserError, match=r"data.x: cannot write into .*/deep/mine: No space left on device"):
        GivenFolder(tmp_path / "deep" / "mine", "data.x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_no_fault(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("cli.given_folder.fcntl.flock", refuse)
    GivenFolder(tmp_path / "mine", "data.x").release()
    (tmp_path / "mine" / "config.yaml").touch()
    with pytest.raises(UserError, match="already holds a run"):
        GivenFolder(tmp_path / "mine", "data.x")


def test_what_was_there_before_stays(tmp_path):
    (tmp_path / "log.txt").touch()
    given = GivenFolder(tmp_path, "data.x")
    (tmp_path / "results.json").touch()
    (tmp_path / "samples").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "samples")
    given.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    given.release()
    (tmp_path / "log.txt").unlink()
    GivenFolder(tmp_path, "data.x").clear()
    assert tmp_path.exists()  # the user made it
    made = GivenFolder(tmp_path / "new" / "deep", "data.x")
    made.clear()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("new", [True, False])
def test_what_a_run_has_written_stays_if_a_checkpoint_is_part_of_it(tmp_path, new):
    before, checkpoint = tmp_path / "checkpoints" / "before.ckpt", tmp_path / "checkpoints" / "last.ckpt"
    before.parent.mkdir()
    before.touch()
    given = GivenFolder(tmp_path, "data.x")
    (tmp_path / "config.yaml").touch()
    if new:
        checkpoint.touch()
    given.clear()
    assert before.exists()
    assert (tmp_path / "config.yaml").exists() == new
    assert checkpoint.exists() == new
