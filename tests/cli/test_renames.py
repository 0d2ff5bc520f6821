"""Names of earlier versions keep working, in files and on the command line, and warn once."""

import warnings
from pathlib import Path

import pytest
import yaml

from cli import renames
from cli.resolver import Resolver
from lightning_modules import question_answering, separability, telepathy

ARGUMENTS = {
    "source": {"path": "assets/pair/source"},
    "target": {"path": "assets/pair/target"},
    "source_layer": 1,
    "bridge": {"class_path": "lightning_modules.PerceiverBridge", "init_args": {"depth": 1}},
}
OLD_TELEPATHY = {"class_path": "lightning_modules.Telepathy", "init_args": ARGUMENTS | {"faithful": True}}
OLD = {"model": OLD_TELEPATHY, "data": {"class_path": "datamodules.WordProblems"}}


@pytest.fixture(autouse=True)
def forget():
    renames._warn.cache_clear()


@pytest.fixture
def resolve(workplace):
    """Return a function that resolves a command line of `fit` with an old config and gives its model."""

    def call(config: dict, *args: str) -> dict:
        Path("old.yaml").write_text(yaml.safe_dump(config))
        return Resolver(["fit", "--config", "old.yaml", *args]).resolved["model"]

    return call


def test_the_config_of_an_old_run_is_read(resolve):
    with pytest.warns(FutureWarning) as caught:
        model = resolve(OLD)
    assert model["class_path"].endswith(".Telepathy")
    assert model["init_args"]["bridge"]["class_path"].endswith(".PerceiverBridge")
    assert model["init_args"]["bridge"]["init_args"]["depth"] == 1
    assert model["init_args"]["reproduce_flaws"] is True
    messages = sorted(str(warning.message) for warning in caught if warning.category is FutureWarning)
    assert len(messages) == 3
    assert messages[0] == "faithful is now named reproduce_flaws; the old name still works"


def test_an_old_name_warns_once(resolve):
    with pytest.warns(FutureWarning):
        resolve(OLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        resolve(OLD)


@pytest.mark.parametrize("key", ["--model.faithful=true", "--model.init_args.faithful=true"])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_key_on_the_command_line(resolve, key, joined):
    new = {"model": {"class_path": "Telepathy", "init_args": ARGUMENTS}, "data": {"class_path": "WordProblems"}}
    assert resolve(new)["init_args"]["reproduce_flaws"] is False
    assert resolve(new, *([key] if joined else key.split("=")))["init_args"]["reproduce_flaws"] is True


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_overlay_without_a_class_path(resolve):
    Path("overlay.yaml").write_text("model: {init_args: {faithful: false}}")
    assert resolve(OLD, "--config", "overlay.yaml")["init_args"]["reproduce_flaws"] is False


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_classes_on_the_command_line():
    line = ["fit", "--model", "lightning_modules.Separability", "--model.bridge=lightning_modules.TokenBridge"]
    line += ["--model.class_path", "LanguageModel"]
    expected = ["fit", "--model", "Separability", "--model.bridge=TokenBridge", "--model.class_path"]
    assert renames.renamed_line(line) == [*expected, "QuestionAnswering"]


def test_an_argument_of_another_class_keeps_its_name():
    config = {"class_path": "mine.Model", "init_args": {"faithful": 1}}
    assert renames.renamed({"model": config, "list": [config]}) == {"model": config, "list": [config]}


@pytest.mark.parametrize("name", sorted(set(renames.CLASSES.values())))
def test_every_new_name_is_a_class_of_a_line(name):
    lines = (question_answering, separability, telepathy)
    assert [line for line in lines if isinstance(getattr(line, name, None), type)]
