"""The config that a checkpoint was made with, compared with the config of the run that uses it."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_modules.core.checkpoints import saved_config

# Settings that change neither the weights nor what is measured
INDIFFERENT = {
    "data.eval_batch_size",
    "data.inputs",
    "data.num_workers",
    "model.cache_source",
    "model.compile",
    "model.cuda_graphs",
    "model.on_nonfinite",
    "model.save_members",
    "model.save_to",
    "model.shard_frozen",
    "model.start",
}
# Settings of training, which an evaluation does not read
TRAINING = {
    "data.batch_size",
    "data.epoch_batches",
    "data.epoch_size",
    "data.max_tokens",
    "data.passkey_fraction",
    "data.train_sets",
    "data.weights",
    "model.dropout",
    "model.loss_precision",
    "model.objectives",
    "model.optimizer",
    "model.repeat_fraction",
    "model.repeat_prompt",
    "model.residual_dropout",
    "model.schedule",
    "model.scheduled_sampling",
    "model.seed",
    "model.warmup_steps",
}
# Held-out sets that a command does not use; AssociativeRecall validates on rows of its test sets
OTHER_SETS = {
    "validate": {"data.test_len", "data.test_sets", "data.test_size"},
    "test": {"data.validation_size"},
    "predict": {"data.validation_size"},
}
SCHEDULE = {"trainer.max_steps", "model.warmup_steps", "model.schedule"}
# What a resumed fit does differently under another value, beside model and data
RESUMED = {
    "seed_everything",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_algorithm",
    "trainer.gradient_clip_val",
    "trainer.precision",
}

LONGEST = 80  # characters of a value in a sentence

Difference = tuple[str, object, object]  # name, value in the checkpoint, value in this run


def setting(config: Mapping[str, Any], name: str, absent: bool = False) -> Any:
    """Return a setting by its short name, such as `model.source_layer`; None if the config does not have it.

    Args:
        config: A resolved config, as plain types.
        name: The name, without `init_args`.
        absent: Return whether the config does not have the setting instead of its value.
    """
    value: Any = config
    for part in name.split("."):
        value = value.get("init_args", value) if isinstance(value, Mapping) else value
        if not isinstance(value, Mapping) or part not in value:
            return True if absent else None
        value = value[part]
    return False if absent else value


def class_of(config: Mapping[str, Any], name: str) -> str | None:
    """Return the bare name of the class at a setting, or None."""
    spec = setting(config, name)
    path = spec.get("class_path") if isinstance(spec, Mapping) else spec
    return path.rpartition(".")[2] if isinstance(path, str) else None


def made_with(command: str, content: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return `made with <setting> <value>, and this run has <value>` for all settings that differ, or an empty string.

    Args:
        command: The command; settings that do not matter for it are left out.
        content: The content of the checkpoint.
        config: The resolved config of this run.
    """
    found = _differences(command, saved_config(content), config)
    parts = [f"with {name} {_text(there)}, and this run has {_text(here)}" for name, there, here in found]
    return f"made {'; '.join(parts)}" if parts else ""


def changes_of_training(content: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return sentences on the optimizer's settings that a resumed fit ignores, and on changes of its schedule."""
    sentences = []
    for name, there, here in _ignored(content, config):
        sentences.append(f"the resume ignores {name} {_text(here)} and keeps {_text(there)} of the checkpoint")
    for name, there, here in _schedule(saved_config(content), config):
        change = f"from {_text(there)} to {_text(here)}"
        sentences.append(f"{name} changes {change}, and with it the schedule of the learning rate")
    return sentences


def _differences(command: str, saved: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Difference]:
    if command == "fit":
        indifferent = INDIFFERENT | SCHEDULE | {"model.optimizer"}
    else:
        indifferent = INDIFFERENT | TRAINING | OTHER_SETS.get(command, set())
        if class_of(config, "data") == "AssociativeRecall" and command == "validate":
            indifferent = indifferent - {"data.test_sets"}
    for part in ("model", "data"):
        if part in saved and part in config:
            yield from _compare(part, saved[part], config[part], indifferent)
    for name in sorted(RESUMED) if command == "fit" else []:
        if not setting(saved, name, absent=True):
            yield from _compare(name, setting(saved, name), setting(config, name), indifferent)


def _compare(name: str, there: Any, here: Any, indifferent: set[str]) -> Iterator[Difference]:
    """Yield the settings that differ; those that one side does not have are of another version of the code."""
    if name in indifferent or _same(there, here):
        return
    classes = [value.get("class_path") if isinstance(value, Mapping) else None for value in (there, here)]
    if all(isinstance(path, str) for path in classes):
        bare = [path.rpartition(".")[2] for path in classes if path]
        if bare[0] != bare[1]:
            yield name, *bare
            return
        there, here = _init_args(there), _init_args(here)
    elif not (isinstance(there, Mapping) and isinstance(here, Mapping) and there.keys() == here.keys()):
        yield name, *(path or value for path, value in zip(classes, (there, here), strict=True))
        return
    for key in sorted(there.keys() & here.keys(), key=str):
        yield from _compare(f"{name}.{key}", there[key], here[key], indifferent)


def _init_args(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = spec.get("init_args")
    return arguments if isinstance(arguments, Mapping) else {}


def _same(there: object, here: object) -> bool:
    if isinstance(there, str) and isinstance(here, str):
        return there == here or os.path.realpath(there) == os.path.realpath(here)
    return bool(there == here)


def _ignored(content: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the optimizer's settings that a resume takes from the checkpoint."""
    groups = [group for state in content["optimizer_states"] for group in state["param_groups"]]
    settings = setting(config, "model.optimizer")
    settings = settings.get("init_args") if isinstance(settings, Mapping) else None
    for key, here in sorted((settings or {}).items()):
        # A schedule changes `lr` and keeps the value that it multiplies.
        values = [group.get("initial_lr", group.get(key)) if key == "lr" else group.get(key) for group in groups]
        values = [list(value) if isinstance(value, tuple) else value for value in values]
        if groups and all(key in group for group in groups) and not any(_same(value, here) for value in values):
            yield f"model.optimizer.{key}", values[0], here


def _schedule(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield what changes the schedule of the learning rate, in modules that have one."""
    if setting(config, "model.warmup_steps", absent=True) or setting(saved, "model.warmup_steps", absent=True):
        return
    constant = setting(config, "model.schedule") == setting(saved, "model.schedule") == "constant"
    for name in sorted(SCHEDULE - {"trainer.max_steps"} if constant else SCHEDULE):
        there, here = setting(saved, name), setting(config, name)
        if there != here:
            yield name, there, here


def _text(value: object) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
