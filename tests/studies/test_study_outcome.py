"""What a run has used is remembered beside its folder, and compared with what is there now."""

from studies.engine.outcome import changed_files, outcome, remember_files


def test_what_a_run_used_is_remembered_file_by_file(tmp_path):
    folder, first, second = (tmp_path / name for name in ("lr.1", "first.txt", "second.txt"))
    first.write_text("1")
    second.write_text("2")
    both = [str(first), str(second)]
    assert changed_files(folder, both) == []  # of a run that has remembered nothing
    remember_files(folder, both[:1])
    assert changed_files(folder, both) == both[1:]  # which the run has not used yet
    (tmp_path / "lr.1.uses.json").write_text("{")
    assert outcome(folder, uses=both).damage == f"{tmp_path / 'lr.1.uses.json'} is damaged: it is not whole JSON"
