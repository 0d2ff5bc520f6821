"""A study's file: arms become runs, in waves; mistakes are refused before anything runs."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tiny_study import in_this_interpreter

import main
from cli.resolver import Resolver
from datamodules.errors import UserError
from studies.engine.arms import Factors
from studies.engine.resolver import resolve
from studies.engine.study import load
from studies.engine.study_file import StudyFile

BASE = {
    "base": ["configs/telepathy_v15.yaml"],
    "seeds": 2,
    "arms": {
        "control": {},
        "small": {"set": {"data.batch_size": 4}},
        "clamped": {
            "command": "test",
            "set": {
                "ckpt_path": "{arms.control.checkpoint}",
                "trainer.callbacks": [{"class_path": "ActivationClamp", "init_args": {"site": "x", "mode": "zero"}}],
            },
        },
    },
    "measures": ["test/accuracy"],
    "claims": {"one": "difference(control, small) > 0"},
}


@pytest.fixture
def study(workplace):
    """Loads a study of given keys over a base one."""

    def make(**keys):
        Path("question.yaml").write_text(yaml.safe_dump(BASE | keys, sort_keys=False))
        return load("question.yaml")

    return make


def test_arms_by_seeds_in_waves(study):
    made = study()
    assert (made.name, made.arms) == ("question", ["control", "small", "clamped"])
    assert [(run.arm, run.seed, run.wave) for run in made.runs] == [
        ("control", 0, 0), ("control", 1, 0), ("small", 0, 0), ("small", 1, 0), ("clamped", 0, 1), ("clamped", 1, 1),
    ]  # fmt: skip
    configs = [yaml.safe_load(run.config) for run in made.runs]
    assert [config["seed_everything"] for config in configs] == [0, 1] * 3
    assert [config["data"]["init_args"]["batch_size"] for config in configs] == [16, 16, 4, 4, 16, 16]
    for run, config in zip(made.runs[4:], configs[4:], strict=True):
        control = next(other for other in made.runs if (other.arm, other.seed) == ("control", run.seed))
        assert config["ckpt_path"] == str(control.folder / "checkpoints" / "last.ckpt")
        assert (run.uses, made.needed(run)) == ((config["ckpt_path"],), [control])
        assert (control.leaves, run.leaves) == (("checkpoints/last.ckpt",), ())
        assert [callback["class_path"] for callback in config["trainer"]["callbacks"]] == ["callbacks.ActivationClamp"]


def test_no_two_runs_share_a_seed_of_a_member(study):
    base = ["configs/separability_interleaved.yaml"]
    arms = {"one": {}, "many": {"set": {"model.ensemble": 4}}}
    made = study(base=base, arms=arms, seeds=[0, 1, 3], claims={})
    assert [(run.arm, run.seed, run.members) for run in made.runs] == [
        ("one", 0, 1), ("one", 1, 1), ("one", 3, 1), ("many", 0, 4), ("many", 4, 4), ("many", 12, 4),
    ]  # fmt: skip


def test_a_run_is_known_by_its_whole_config(study):
    first, again = study(), study()
    assert [run.folder for run in first.runs] == [run.folder for run in again.runs]
    Path("overlay.yaml").write_text("trainer: {max_steps: 77}")
    overlaid = study(
        set={"trainer.max_steps": 5}, arms={"control": None, "long": {"configs": ["overlay.yaml"]}}, claims={}
    )
    assert [yaml.safe_load(run.config)["trainer"]["max_steps"] for run in overlaid.runs] == [5, 5, 77, 77]
    other = study(set={"trainer.max_steps": 7})
    assert not {run.folder for run in first.runs} & {run.folder for run in other.runs}
    assert all(yaml.safe_load(run.config)["trainer"]["max_steps"] == 7 for run in other.runs)
    config = Path("configs/telepathy_v15.yaml")
    config.write_text(config.read_text().replace("init_args: {lr: ", "init_args: {lr: 1"))
    assert not {run.folder for run in first.runs} & {run.folder for run in study().runs}


def test_an_argument_of_a_callback_is_set_by_its_name(study):
    Path("clamp.yaml").write_text(
        "trainer: {callbacks+: {class_path: ActivationClamp, init_args: {site: x, mode: naive, reference: none}}}"
    )
    Path("reference.yaml").write_text("trainer: {callbacks+: {class_path: ActivationReference, init_args: {site: x}}}")
    clamped = {"configs": ["clamp.yaml"], "set": {"clamp.reference": "{arms.control.reference}"}}
    arms = {"control": {"configs": ["reference.yaml"]}, "naive": clamped}
    control, naive = study(arms=arms, claims={}, seeds=1).runs
    *kept, clamp = yaml.safe_load(naive.config)["trainer"]["callbacks"]
    assert clamp["init_args"]["reference"] == str(control.folder / "reference.safetensors")
    assert kept == yaml.safe_load(control.config)["trainer"]["callbacks"][:-1]
    assert naive.wave == 1


CLAMPS = """
trainer:
  callbacks+:
    - {class_path: ActivationClamp, init_args: {site: x, mode: naive, reference: none}}
    - {class_path: ActivationClamp, init_args: {site: y, mode: naive, reference: none}}
"""


@pytest.mark.parametrize("word", ["clamp[1]", "ActivationClamp[1]"])
def test_one_of_two_callbacks_of_a_class_is_named_by_its_place(study, word):
    Path("clamps.yaml").write_text(CLAMPS)
    arms = {"control": {}, "naive": {"configs": ["clamps.yaml"], "set": {f"{word}.reference": "here"}}}
    config = yaml.safe_load(study(arms=arms, claims={}, seeds=1).runs[1].config)
    assert [clamp["init_args"]["reference"] for clamp in config["trainer"]["callbacks"][-2:]] == ["none", "here"]


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("clamp.reference", "'clamp' matches 2 callbacks; write ActivationClamp[0] or ActivationClamp[1] instead"),
        ("ActivationClamp.site", "'ActivationClamp' matches 2 callbacks; write ActivationClamp[0] or"),
        ("activation.site", "'activation' matches 3 callbacks; write ActivationClamp[0] or ActivationClamp[1] or"),
        ("monitor.every_n_steps", "'monitor' matches 2 callbacks; write DiversityMonitor or LearningRateMonitor"),
        ("clamp[2].site", "only 2 of the callbacks match 'clamp', and the first is clamp[0]"),
        ("clamp[x].site", "neither a key of a config nor an argument of a callback; the callbacks are QuickEval, "),
    ],
)
def test_a_word_that_may_mean_several_callbacks_is_refused(study, key, sentence):
    noise = "    - {class_path: ActivationNoise, init_args: {site: x, strength: 1.0}}\n"
    Path("clamps.yaml").write_text(CLAMPS + (noise if key.startswith("activation") else ""))
    with pytest.raises(UserError) as raised:
        study(arms={"a": {"configs": ["clamps.yaml"], "set": {key: "x"}}}, claims={})
    assert str(raised.value).startswith(f"arms.a: set.{key}: ")
    assert sentence in str(raised.value)


def test_the_settings_in_which_arms_differ(study):
    Path("clamps.yaml").write_text(CLAMPS)
    arms = {"control": {}, "small": {"set": {"data.batch_size": 4}}, "clamped": {"configs": ["clamps.yaml"]}}
    settings = study(arms=arms, claims={}, seeds=1).settings
    assert settings["control"] == {"data.batch_size": 16}
    assert settings["small"] == {"data.batch_size": 4}
    clamped = {"data.batch_size": 16, "ActivationClamp.site": "x", "ActivationClamp[1].site": "y"}
    assert settings["clamped"].items() >= clamped.items()
    assert not [key for key in settings["clamped"] if not key.startswith(("data.batch_size", "ActivationClamp"))]


def test_a_config_is_resolved_as_the_run_itself_resolves_it(workplace):
    """The parser of a command is used many times; what one arm sets must not remain for the next."""
    base = ["fit", "--config", "configs/telepathy_v15.yaml"]
    for more in ([], ["--model.output", "none", "--trainer.callbacks", "[]"], ["--data.batch_size", "3"], []):
        assert resolve(*base, *more) == Resolver([*base, *more]).resolved


def test_sweeps_are_written_out(study):
    arms = {"control": {}, "grid": {"sweep": {"data.batch_size": [4, 8], "model.optimizer.lr": [0.1, 1.0e-4]}}}
    made = study(arms=arms, claims={"one": "grid_4_0p1 > 0"}, seeds=[3])
    assert made.arms == ["control", "grid_4_0p1", "grid_4_0p0001", "grid_8_0p1", "grid_8_0p0001"]
    assert made.factors["grid_8_0p1"] == Factors("grid", {"data.batch_size": 8, "model.optimizer.lr": 0.1})
    config = yaml.safe_load(made.runs[3].config)
    assert config["seed_everything"] == 3
    assert config["data"]["init_args"]["batch_size"] == 8
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"arms": {"a": {"set": {"data.batch_sise": 4}}}}, "did you mean 'batch_size'"),
        ({"arms": {"a": {"configs": ["missing.yaml"]}}}, "missing.yaml"),
        ({"arms": {"a": {"command": "train"}}}, "command"),
        ({"arms": {"a": {"comand": "fit"}}}, "did you mean 'command'"),
        ({"arms": {}}, "at least one arm"),
        ({"arms": {"a-b": {}}}, "use letters, digits and _"),
        ({"arms": {"a": {"set": {"ckpt_path": "{arms.b.checkpoint}"}}}}, "arms.a: there is no arm b"),
        ({"arms": {"a": {}, "b": {"set": {"ckpt_path": "{arms.a.chekpoint}"}}}}, "did you mean 'checkpoint'?"),
        (
            {"arms": {"a": {"set": {"ckpt_path": "{arms.b.folder}"}}, "b": {"set": {"ckpt_path": "{arms.a.folder}"}}}},
            "in a circle",
        ),
        ({"arms": {"a": {"set": {"ckpt_path": "{arm.b.checkpoint}"}}}}, "{arm.b.checkpoint} is no reference"),
        ({"arms": {"a": {"set": {"clamp.reference": "x"}}}}, "the callbacks are QuickEval, DiversityMonitor"),
        ({"arms": {"a": {"set": {"throughput.every": 3}}}}, "Throughput has no argument 'every'"),
        ({"arms": {"a": {"sweep": {"data.batch_size": []}}}}, "arms.a.sweep: data.batch_size has no values"),
        ({"arms": {"a": {"set": {"seed_everything": 3}}}}, "arms.a: set.seed_everything has no effect, because seeds"),
        ({"set": {"trainer.default_root_dir": "x"}, "arms": {"a": {}}}, "set.trainer.default_root_dir has no effect"),
        (
            {"arms": {"a": {"command": "test"}, "b": {"set": {"ckpt_path": "{arms.a.checkpoint}"}}}},
            "arms.b: {arms.a.checkpoint}: a run of arms.a does not train",
        ),
        (
            {"arms": {"a": {}, "b": {"set": {"ckpt_path": "{arms.a.reference}"}}}},
            "arms.b: {arms.a.reference}: arms.a needs the callback ActivationReference",
        ),
        ({"arms": {1: {}}}, "arms.1: use letters"),
        ({"arms": {"a": {"set": {5: 8}}}}, "there is no key '5'"),
        ({"arms": {"a": {}, "b": {"command": "train"}}}, "in the study's arms.b"),
        ({"arms": {"a": "overlay.yaml"}}, "arms.a: expected keys, such as"),
        ({"measures": None}, "no value for measures\n"),
        ({"measures": ["test/loss", "test/loss"]}, "measures: each only once"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"measure": ["x"]}, "did you mean 'measures'"),
        ({"claims": {"one": "control >> 2"}}, "claims.one: expected a number, not >"),
        ({"claims": {"one": "contrl > 2"}}, "did you mean 'control'?"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(workplace, capsys, keys, sentence):
    Path("question.yaml").write_text(yaml.safe_dump(BASE | {"claims": {}} | keys, sort_keys=False))
    with in_this_interpreter(), pytest.raises(SystemExit) as ended:
        main.main(["study", "question.yaml"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_a_key_without_a_value_has_its_default(study):
    empty = dict.fromkeys(["configs", "set", "sweep", "command"])
    made = study(set=None, seeds=None, claims=None, curves=None, arms={"control": empty})
    assert (made.claims, made.curves) == ([], [])
    assert [(run.name, run.command) for run in made.runs] == [("control, seed 0", "fit")]


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "studies").glob("*.yaml") if path.stem != "ledger")
)
def test_every_study_in_the_repository_is_sound(workplace, name):
    path = ROOT / "studies" / f"{name}.yaml"
    assert path.read_text().startswith(f"# python main.py study studies/{name}.yaml")
    made = load(str(path))
    assert made.claims
    assert set(yaml.safe_load(path.read_text())) <= set(StudyFile.__dataclass_fields__)


def test_a_callback_of_another_package_is_kept_as_written(study):
    monitor = {
        "class_path": "lightning.pytorch.callbacks.LearningRateMonitor",
        "init_args": {"logging_interval": "step"},
    }
    arms = {"control": {}, "watched": {"set": {"trainer.callbacks": [monitor]}}}
    config = yaml.safe_load(study(arms=arms, claims={}, seeds=1).runs[1].config)
    assert [callback["init_args"]["logging_interval"] for callback in config["trainer"]["callbacks"]] == ["step"]
