"""A trained bridge as one safetensors file, with what identifies the models that it was trained between.

Shapes: S source positions of a question, C source width, V target vocabulary.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.archive import find_file
from lightning_modules.core.checkpoints import check_finite
from lightning_modules.core.files import replacing
from lightning_modules.pretrained.fingerprint import fingerprint
from lightning_modules.telepathy.module import Telepathy

KEY = "crosstalk"  # of the metadata
PROBE = "Ann has 12 cups and buys 30 more. How many cups does Ann have?"
MODELS = "source", "target"
TRAINING = ("text_prefix.", "heads.", "probe.")  # tensors that a trained bridge does not need


class Exported(NamedTuple):
    """The content of a file.

    Attributes:
        tensors: The trained tensors by their names in the module, and `probe.states` and `probe.logits`.
        about: The config of the model and what identifies its source and target.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]


def export(module: Telepathy, config: Mapping[str, Any], path: Path) -> None:
    """Write a bridge to a file.

    The metadata has one entry, `crosstalk`, JSON with the keys `config` (class and arguments of the model), `source`,
    `target` and `probe`, a question. `probe.states`, [S, C], are the source's states at that question, and
    `probe.logits`, [V], those of the target behind its prompt without soft tokens. Any program can compare them with
    what its models give.

    Args:
        module: The module with trained weights.
        config: The config of the model, as plain types.
        path: The file.
    """
    source, target = module.source, module.target
    batch = move_data_to_device(source.tokenize([PROBE]), module.device)
    (row,) = target.rows.soft([""], [""], training=False)
    about = {
        "config": dict(config),
        "probe": PROBE,
        "source": {
            "path": source.path,
            "layers": module.layers,
            "before": source.before,  # the text before the question
            "added": source.added,  # special tokens before and behind the text
            "start": int(batch["source_place"][0, 0]),  # where the tokens of a question begin
            "fingerprint": _of_source(module),
        },
        "target": {
            "path": target.path,
            "head": row.prompt[: row.place],  # tokens before and behind the soft tokens
            "tail": row.prompt[row.place :],
            "fingerprint": _of_target(module),
        },
    }
    with torch.no_grad():
        prompt_BT = torch.tensor([row.prompt], device=target.model.device)
        probes = {
            "probe.states": source.read(batch)[0],
            "probe.logits": target.model(input_ids=prompt_BT, use_cache=False).logits[0, -1].float(),
        }
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(TRAINING)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in (state | probes).items()}
    with replacing(path) as draft:
        draft.write_bytes(save(tensors, {KEY: json.dumps(about)}))


def read_exported(path: str, option: str) -> Exported:
    """Read a file that `export` wrote.

    Args:
        path: The file.
        option: The option that took the path, for messages.

    Raises:
        UserError: It cannot be read, or is another safetensors file.
    """
    try:
        with safe_open(find_file(path, option), "pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{option}: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(about, dict) or not all(isinstance(about.get(key), dict) for key in ("config", *MODELS)):
        raise UserError(f"{option}: {path} was not written by `python main.py export`")
    if lacking := [key for key in MODELS if not {"path", "fingerprint"} <= about[key].keys()]:
        raise UserError(f"{option}: {path} is damaged: it does not identify its {lacking[0]}")
    check_finite({"state_dict": tensors}, option, path)
    return Exported(tensors, about)


def restore(module: Telepathy, exported: Exported, option: str) -> None:
    """Give a module, built from the file's config, the weights of the file.

    Raises:
        UserError: The module has another source or target than those that the bridge was trained between, or another
            bridge.
    """
    for which, found in (("source", _of_source(module)), ("target", _of_target(module))):
        if found != exported.about[which]["fingerprint"]:
            path = exported.about[which]["path"]
            raise UserError(
                f"{option}: the bridge was trained with another {which} than '{path}' is now: its weights or its "
                "configuration differ"
            )
    state = {name: value for name, value in module.state_dict().items() if name.startswith(TRAINING)}
    state |= {name: value for name, value in exported.tensors.items() if not name.startswith("probe.")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()  # below a heading
        raise UserError(f"{option}: the bridge does not fit the config: {fault}") from error


def _of_source(module: Telepathy) -> str:
    return fingerprint(module.source.model, module.source.model.model.config)


def _of_target(module: Telepathy) -> str:
    return fingerprint(module.target.model, module.target.model.config)
