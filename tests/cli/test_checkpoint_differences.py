"""How two configs are compared: what is a difference, under which name, and with which values."""

import pytest

from cli.checkpoint_settings import changes_of_training, class_of, made_with, setting


def config(data=None, **arguments):
    model = {"class_path": "lines.Model", "init_args": arguments}
    return {"model": model, "data": {"class_path": "tasks.Task", "init_args": data or {}}, "seed_everything": 0}


def differences(there, here, command="test"):
    return made_with(command, {"config": there}, here).removeprefix("made ")


def test_a_setting_is_found_by_its_short_name():
    found = config(width=2, start=None, part={"class_path": "a.B", "init_args": {"size": 3}})
    assert setting(found, "model.part.size") == 3
    assert setting(found, "model.width.size") is setting(found, "model.depth") is None
    absent = {"model.part.size": False, "model.start": False, "model.depth": True, "model.width.size": True}
    assert {name: setting(found, name, absent=True) for name in absent} == absent


def test_the_class_of_a_setting_has_its_bare_name():
    found = config(part={"class_path": "a.B"}, bare="c.d.E", plain="F", number=3)
    names = {"part": "B", "bare": "E", "plain": "F", "number": None, "absent": None}
    assert {name: class_of(found, f"model.{name}") for name in names} == names


PART, OTHER = ({"class_path": path, "init_args": {"size": 3}} for path in ("a.b.Part", "a.Other"))
CASES = {
    "equal": ({"x": 1, "y": [1, {"z": 2}]}, {"x": 1, "y": [1, {"z": 2}]}, ""),
    "another version": ({"x": 1, "old": 2}, {"x": 1, "new": 3}, ""),
    "a moved class": ({"part": PART}, {"part": {**PART, "class_path": "c.Part"}}, ""),
    "a class without arguments": ({"part": PART}, {"part": {"class_path": "a.b.Part", "init_args": None}}, ""),
    "an argument": (
        {"part": PART},
        {"part": {"class_path": "c.Part", "init_args": {"size": 4}}},
        "with model.part.size 3, and this run has 4",
    ),
    "another class": ({"part": PART}, {"part": OTHER}, "with model.part Part, and this run has Other"),
    "no class": ({"part": PART}, {"part": None}, "with model.part 'a.b.Part', and this run has None"),
    "a mapping": ({"sets": {"a": 1, "b": 2}}, {"sets": {"a": 1, "b": 3}}, "with model.sets.b 2, and this run has 3"),
    "other keys": ({"sets": {"a": 1}}, {"sets": {"a": 1, "b": 2}}, "with model.sets {'a': 1}, and this run has {'a'"),
    "a path": ({"text": "a/../b.txt"}, {"text": "./b.txt"}, ""),
    "a long text": ({"text": "x" * 100}, {"text": "y y"}, f"with model.text {'x' * 77}..., and this run has 'y y'"),
    "not too long": ({"text": "x" * 80}, {"text": "y"}, f"with model.text {'x' * 80}, and this run has y"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named_once(case):
    there, here, said = CASES[case]
    found = differences(config(**there), config(**here))
    assert found.startswith(said) if said else not found
    assert found.count("with ") == bool(said)


def test_differences_come_in_order_of_their_names():
    names = [part.split()[1] for part in differences(config({"k": 1}, b=1, a=1), config({"k": 2}, b=2, a=2)).split(";")]
    assert names == ["model.a", "model.b", "data.k"]


def test_a_checkpoint_or_a_run_without_a_part_is_not_compared():
    whole = config(x=1)
    assert differences({"model": whole["model"]}, config({"k": 1}, x=1)) == ""
    assert differences(config({"k": 1}, x=1), {"model": whole["model"]}) == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [("fit", "with seed_everything 0, and this run has 7"), ("test", ""), ("validate", "")],
)
def test_what_a_fit_alone_reads_is_no_difference_of_an_evaluation(command, said):
    there, here = config(), config() | {"seed_everything": 7, "trainer": {"precision": "16-mixed"}}
    assert differences(there, here, command) == said  # the checkpoint does not know the precision


@pytest.mark.parametrize(
    ("command", "task", "said"),
    [
        ("validate", "WordProblems", ""),
        ("validate", "AssociativeRecall", "with data.test_sets 1, and this run has 2"),
        ("test", "WordProblems", "with data.test_sets 1, and this run has 2"),
        ("predict", "AssociativeRecall", "with data.test_sets 1, and this run has 2"),
    ],
)
def test_test_sets_matter_where_a_command_uses_them(command, task, said):
    there, here = config({"test_sets": 1, "validation_size": 3}), config({"test_sets": 2, "validation_size": 3})
    for one in (there, here):
        one["data"]["class_path"] = f"datamodules.{task}"
    assert differences(there, here, command) == said


def test_a_validation_set_may_be_cut_where_another_run_trained_if_that_has_a_test_file():
    there, here = config({"test_path": "a.csv", "test_size": 1, "test_len": 1}), config({"test_path": None})
    assert differences(there, here, "validate") == "with data.test_path 'a.csv', and this run has None"
    here["data"]["init_args"] = {"test_path": "a.csv", "test_size": 2, "test_len": 2}
    assert differences(there, here, "validate") == ""


def resume(groups, *, here=None, there=None, trainer=None, **arguments):
    """Return the changes of a resume whose config has the arguments of an optimizer."""
    optimizer = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": arguments}}
    now = config(**optimizer, **(here or {})) | {"trainer": {"max_steps": 9}}
    content = {"optimizer_states": [{"param_groups": groups}]}
    if there is not None:
        content["config"] = config(**there) | {"trainer": trainer or {"max_steps": 9}}
    return changes_of_training(content, now)


def test_the_optimizer_keeps_the_settings_of_the_checkpoint():
    assert resume([{"lr": 0.1}], lr=0.1) == resume([{"lr": 0.0, "initial_lr": 0.1}], lr=0.1) == []
    (ignored,) = resume([{"lr": 0.1}], lr=0.2)
    assert ignored == "the resume ignores model.optimizer.lr 0.2 and keeps 0.1 of the checkpoint"
    assert resume([{"betas": (0.9, 0.99)}], betas=[0.9, 0.99]) == []
    assert resume([{"lr": 0.1}, {"lr": 0.2}], lr=0.2) == []  # one of the groups has it
    assert resume([{"lr": 0.1}, {"eps": 1.0}], eps=2.0) == []  # not all groups have it
    assert resume([], lr=0.1) == []
    content = {"optimizer_states": [{"param_groups": [{"lr": 1}]}]}
    for optimizer in ("torch.optim.SGD", {"class_path": "torch.optim.SGD"}):  # without arguments
        assert changes_of_training(content, config(optimizer=optimizer)) == []
    sentences = resume([{"lr": 0.1, "eps": 1.0}], lr=0.2, eps=2.0)
    assert [sentence.split()[3] for sentence in sentences] == ["model.optimizer.eps", "model.optimizer.lr"]


def test_a_change_of_the_schedule_is_told():
    cosine, constant = ({"warmup_steps": 2, "schedule": kind} for kind in ("cosine", "constant"))
    longer = "trainer.max_steps changes from 5 to 9, and with it the schedule of the learning rate"
    assert resume([], here=cosine, there=cosine) == []
    assert resume([], here=cosine, there=cosine, trainer={"max_steps": 5}) == [longer]
    assert resume([], here=constant, there=constant, trainer={"max_steps": 5}) == []
    assert len(resume([], here=constant, there=cosine, trainer={"max_steps": 5})) == 2
    assert len(resume([], here=constant | {"warmup_steps": 3}, there=constant)) == 1
    assert resume([], here={}, there=cosine, trainer={"max_steps": 5}) == []  # a model without a warm-up
    assert resume([], here=cosine, there={}, trainer={"max_steps": 5}) == []
