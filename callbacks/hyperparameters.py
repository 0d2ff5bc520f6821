"""The settings of a run in TensorBoard's HPARAMS tab: one row per run, beside the metrics of the run."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

Setting = bool | float | str
TRAINER_KEYS = ("max_steps", "max_epochs", "precision")
OPTIMIZER_KEYS = ("lr", "weight_decay")
WITHOUT_EFFECT = ("data.eval_batch_size", "data.num_workers")  # results do not depend on them


def main_settings(config: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings that distinguish runs, under short keys.

    - `seed`, `max_steps`, `max_epochs`, `precision`, `batch_size`;
    - `model` and `data`: class names. `model.<argument>` and `data.<argument>`: arguments that are numbers, strings or
      lists of these; `model.<argument>.<argument>`: the same of nested classes and dictionaries;
    - `optimizer`, `lr`, `weight_decay`: class name and arguments of `model.optimizer`;
    - `callbacks`: class names of the configured callbacks.

    Settings that are null, or that do not change results, are left out.

    Args:
        config: The resolved config of a command, as plain types.
    """
    settings = _flat("model", config.get("model")) | _flat("data", config.get("data"))
    optimizer = {key: settings.pop(key) for key in [*settings] if f"{key}.".startswith("model.optimizer.")}
    if "model.optimizer" in optimizer:
        settings["optimizer"] = optimizer["model.optimizer"]
    settings |= {key: optimizer[long] for key in OPTIMIZER_KEYS if (long := f"model.optimizer.{key}") in optimizer}
    for key in WITHOUT_EFFECT:
        settings.pop(key, None)
    if "data.batch_size" in settings:
        settings["batch_size"] = settings.pop("data.batch_size")
    trainer = config.get("trainer") or {}
    scalars = {key: trainer.get(key) for key in TRAINER_KEYS} | {"seed": config.get("seed_everything")}
    for key, value in scalars.items():
        settings |= _flat(key, value)
    if names := _class_names(trainer.get("callbacks")):
        settings["callbacks"] = names
    return settings


def _flat(key: str, value: Any) -> dict[str, Setting]:
    if isinstance(value, bool | int | float | str):
        return {key: value}
    if isinstance(value, list | tuple):
        plain = all(isinstance(item, bool | int | float | str) for item in value)
        return {key: ", ".join(map(str, value))} if value and plain else {}
    if not isinstance(value, Mapping):
        return {}
    settings: dict[str, Setting] = {}
    if "class_path" in value:
        settings[key] = _class_name(value)
        value = value.get("init_args") or {}
    for name, argument in value.items():
        settings |= _flat(f"{key}.{name}", argument)
    return settings


def _class_name(value: Mapping[str, Any]) -> str:
    return str(value["class_path"]).rpartition(".")[2]


def _class_names(callbacks: Any) -> str:
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    return ", ".join(sorted(_class_name(one) for one in listed if isinstance(one, Mapping) and "class_path" in one))


def log_settings(trainer: Trainer, settings: Mapping[str, Setting]) -> None:
    """Write the settings into the event file of every TensorBoard logger, and flush it in case the run is killed.

    TensorBoard then shows a row with the settings and the last value of each scalar of the run. Lightning's
    `log_hyperparams` with metrics would also write a list of columns. TensorBoard uses the list of the first run in
    its folder, and hides settings and metrics that only other runs have. Without a list it shows the columns of all
    runs; but if `--logdir` is the folder of one run, rather than a folder above it, the metrics are missing.
    """
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for key, value in settings.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[key], field, value)
    content = plugin_data_pb2.HParamsPluginData(session_start_info=start)
    _write(trainer, metadata.SESSION_START_INFO_TAG, content)


def log_end(trainer: Trainer) -> None:
    """Write that the run has finished, by which the HPARAMS tab can filter rows.

    TensorBoard keeps the first such entry. A resumed run keeps the events of its first attempt, so an attempt that is
    interrupted or fails writes none.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    _write(trainer, metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))


def _write(trainer: Trainer, tag: str, content: Any) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            summary_metadata = metadata.create_summary_metadata(content)
            value = Summary.Value(tag=tag, metadata=summary_metadata, tensor=metadata.NULL_TENSOR)
            logger.experiment._get_file_writer().add_summary(Summary(value=[value]))
            logger.experiment.flush()
