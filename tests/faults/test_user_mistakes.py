"""Mistakes of users: one sentence and exit code 2 before anything is trained, and no file is left or changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import main
from cli.app import CrosstalkCLI
from datamodules.problems import generate

TRAINER = {
    "max_steps": 2,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def config(model: str, arguments: dict, data: str, **settings: object) -> str:
    return json.dumps(
        {
            "model": {"class_path": model, "init_args": arguments},
            "data": {"class_path": data, "init_args": settings},
            "trainer": TRAINER,
        }
    )


ADAM = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}}
DECODER = {"width": 8, "heads": 2} | ADAM
SMALL = {"batch_size": 4, "validation_size": 4, "eval_batch_size": 4}
PROBLEMS = SMALL | {"test_sets": {"test": 4}}
PAIR = {which: {"path": f"assets/pair/{which}"} for which in ("source", "target")}
BRIDGE = {"class_path": "PerceiverBridge", "init_args": {"soft_tokens": 4, "width": 16, "depth": 1, "heads": 2}}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
BPE = {"vocab_size": 300, "single_digits": True, "texts": 50}
BASES = {
    "mod": config("Separability", DECODER | {"vocab_size": 8, "seq_len": 3}, "ModularArithmetic", p=7),
    "streams": config(
        "Separability", DECODER | {"vocab_size": 16, "seq_len": 8}, "InterleavedStreams", vocab_size=16, seq_len=8
    ),
    "text": config(
        "Separability",
        DECODER | {"vocab_size": 256, "seq_len": 8},
        "TextCorpus",
        **{"source": "file", "path": "text.txt", "seq_len": 8, "test_size": 4} | SMALL,
    ),
    "tel": config("Telepathy", PAIR | {"bridge": BRIDGE, "source_layer": 1} | ADAM, "WordProblems", **PROBLEMS),
    "qa": config("QuestionAnswering", {"config": LLAMA, "tokenizer": BPE} | ADAM, "WordProblems", **PROBLEMS),
}
ASSETS = Path(__file__).parents[2] / "assets"

Prepare = Callable[[], object]
Mistake = tuple[str, list[str], str, Prepare | None]  # base, options, words of the sentence, what makes files
MISTAKES: dict[str, Mistake] = {}


def add(name: str, base: str, options: str | list[str], said: str, prepare: Prepare | None = None) -> None:
    assert name not in MISTAKES
    MISTAKES[name] = base, [options] if isinstance(options, str) else options, said, prepare


def add_values(base: str, key: str, said: str, *values: str) -> None:
    for value in values:
        add(f"{key} {value} {base}", base, f"--{key}={value}", said)


def file(name: str, content: str | bytes) -> Prepare:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


# Numbers out of range

add_values("mod", "model.warmup_steps", "model.warmup_steps must be at least 0", "-3")
add_values("mod", "model.warmup_steps", "model.warmup_steps must be at most", str(10**30))
add_values("mod", "model.width", "model.width must be", "0", "-1", str(10**9))
add_values("mod", "model.depth", "model.depth must be", "0", str(10**9))
add_values("mod", "model.heads", "model.heads must", "0", "3")
add_values("mod", "model.mlp_width", "model.mlp_width must be", "0", "-5")
add_values("mod", "model.vocab_size", "model.vocab_size", "0", "3", str(10**18))
add_values("mod", "model.seq_len", "model.seq_len", "0", "2")
add_values("mod", "model.orthogonality", "model.orthogonality: expected keys, such as {weight: 0.1}, got '0.1'", "0.1")
add_values("mod", "model.ensemble", "model.ensemble must be", "0", str(10**9))
add_values("mod", "model.seed", "model.seed must be", "-1", str(2**64))
add_values("mod", "model.optimizer.lr", "lr must be", ".inf", "0")
add_values("mod", "model.optimizer.lr", "Invalid learning rate", "-1", "-.inf")
add_values("mod", "model.optimizer.lr", "model.optimizer.lr must be a number, not nan", ".nan")
add_values("mod", "model.optimizer.weight_decay", "model.optimizer", "-1", ".inf")
add_values("mod", "model.optimizer.eps", "model.optimizer", "-1", ".inf")
add_values("mod", "model.optimizer.betas", "model.optimizer", "[0.9, 1.0]", "[-0.1, 0.9]", "[0.9]", "0.9")
add("momentum", "mod", ["--model.optimizer=SGD", "--model.optimizer.momentum=5"], "momentum must be at most 1")
add_values("mod", "data.p", "data.p must be", "1", "-7", str(10**9))
add_values("mod", "data.train_fraction", "data.train_fraction", "0", "1", "2", "-0.5", ".nan")
add_values("mod", "data.batch_size", "data.batch_size", "0", "9999")
add_values("tel", "data.max_tokens", "data.max_tokens must be at least", "0", "60")
add_values("qa", "data.max_tokens", "data.max_tokens: QuestionAnswering does not know the lengths of its rows", "900")
add_values("mod", "data.num_workers", "data.num_workers must be 0, 1, 2, 4 or 8", "-1", "3")
add_values("mod", "data.seed", "data.seed must be", "-1", str(2**70))
add_values("mod", "data.task_seed", "data.task_seed must be at least 0", "-1")
add_values("streams", "data.n_streams", "data.n_streams must be", "0", "-2")
add_values("streams", "data.test_size", "data.test_size must be at least 1", "0")
add_values("streams", "data.epoch_size", "data.epoch_size", "0", "7")
add_values("text", "data.max_size", "data.max_size must be at least 1", "0")
add_values("text", "data.bpe_vocab", "data.bpe_vocab must be at least 256", "10")
add_values("text", "data.seq_len", "data.seq_len must be", "0", str(10**9))
add_values("qa", "data.passkey_fraction", "data.passkey_fraction must be", "2", "-1", ".inf")
add_values("qa", "data.validation_size", "data.validation_size must be", "0", "2001")
add_values("qa", "model.repeat_fraction", "model.repeat_fraction must be", "-0.1", "1.5", ".inf")
add_values("qa", "model.max_new_tokens", "model.max_new_tokens must be", "0", "-1", str(10**12))
add_values("qa", "model.warmup_steps", "model.warmup_steps must be at least 0", "-1")
add_values("qa", "model.tokenizer.texts", "model.tokenizer.texts must be", "0")
add_values("qa", "model.tokenizer.vocab_size", "model.tokenizer.vocab_size must be", "5", str(10**10))
add_values("qa", "model.config.hidden_size", "model.config makes no model", "0", "-1", "15", "abc")
add_values("qa", "model.config.num_attention_heads", "model.config makes no model", "0")
add_values("qa", "model.config.vocab_size", "model.config.vocab_size must be at least 300", "5")
add_values("qa", "model.config.hiden_size", "llama has no 'hiden_size'; the nearest names are: hidden_size", "16")
add_values("tel", "model.objectives", "model.objectives", "{lm: -1}", "{lm: .nan}", "{lm: .inf}", "{lm: 0}")
add_values("tel", "model.reproduce_flaws", "did you mean 'missing_bos'?", "[key_scale, missing_bs]", "missing_bs")
add_values("tel", "model.objectives", "got 'lm'", "lm")
add_values("tel", "model.bridge.span", "model.bridge.span must be at least 1", "0", "-3")
add_values("tel", "model.bridge.heads", "model.bridge.heads must be at least 1", "0", "-2")
add_values("tel", "model.bridge.width", "model.bridge.width must be", "0", "-4", str(10**9))
add_values("tel", "model.bridge.soft_tokens", "model.bridge.soft_tokens must be", "0", str(10**9))

# The trainer's flags

add_values("mod", "trainer.max_steps", "max_steps must be", "0", "-5", "-1")
add_values("mod", "trainer.max_epochs", "trainer.max_epochs must be at least 1", "0", "-5")
add_values("mod", "trainer.gradient_clip_val", "trainer.gradient_clip_val must be", "-1", ".nan", ".inf")
add_values("mod", "trainer.log_every_n_steps", "trainer.log_every_n_steps must be at least 1", "0", "-1")
add_values("mod", "trainer.val_check_interval", "val_check_interval", "0", "-1", "2.5", ".nan")
add_values("mod", "trainer.accumulate_grad_batches", "trainer.accumulate_grad_batches must be at least 1", "0", "-1")
add_values("mod", "trainer.check_val_every_n_epoch", "trainer.check_val_every_n_epoch must be at least 1", "0")
add_values("mod", "trainer.num_sanity_val_steps", "trainer.num_sanity_val_steps must be at least -1", "-5")
add_values("mod", "trainer.limit_train_batches", "limit_train_batches", "0", "-1")
add_values("mod", "trainer.limit_val_batches", "limit_val_batches", "-1", "2.5")
add_values("mod", "trainer.num_nodes", "trainer.num_nodes must be at least 1", "0")
add_values("mod", "trainer.devices", "devices", "0", "-5", "x", "9999")
add_values("mod", "trainer.precision", "precision", "17", "bf16-true")
add_values("mod", "trainer.precision", "transformer_engine", "transformer-engine")
add_values("mod", "trainer.accelerator", "", "foo", "tpu")
add_values("mod", "trainer.strategy", "trainer: You selected an invalid strategy name", "dpp")
add_values("mod", "trainer.profiler", "profiler", "foo")
add_values("mod", "trainer.max_time", "is not a valid duration", "foo")
add_values("mod", "trainer", "trainer", "5")
add_values("mod", "seed_everything", "seed_everything", "-1", str(2**64), "x", "1.5", "null")

# Folders and addresses

ROOT = "--trainer.default_root_dir="
add("root is a file", "mod", f"{ROOT}mod.json", "cannot make the folder mod.json")
add("root beneath a file", "mod", f"{ROOT}mod.json/x", "cannot make the folder mod.json/x")
add("root in a file system of the kernel", "mod", f"{ROOT}/proc/x", "cannot write into /proc")
add("root too long", "mod", ROOT + "x" * 300, "is too long for a path")
add("root with a null byte", "mod", f"{ROOT}a\0b", "holds a character that no path has")
add("root empty", "mod", ROOT, "trainer.default_root_dir: the path is empty")
add("root blank", "mod", f"{ROOT} ", "trainer.default_root_dir: the path is empty")
for address in ("s3://bucket/x", "https://host/x", "hf://x/y", "file:///tmp/x"):
    add(f"root {address}", "mod", ROOT + address, f"trainer.default_root_dir: {address} is an address")
add("root at home", "mod", f"{ROOT}~/x", "'~/x' is not expanded in a config, write /")
add("root in a variable", "mod", f"{ROOT}$NOPE/x", "'$NOPE/x' is not expanded in a config")
add("root holds a run", "mod", f"{ROOT}.", ". already holds a run", file("config.yaml", "x"))
add("root with a mistake later", "mod", [f"{ROOT}new/deep", "--model.optimizer.lr=.inf"], "lr must be a finite number")
add("runs is a file", "mod", [], "cannot make a folder for the run", file("runs", "x"))
add("runs leads nowhere", "mod", [], "cannot make a folder for the run", lambda: os.symlink("nowhere", "runs"))
for logger in ("CSVLogger", "TensorBoardLogger"):
    for folder in ("mod.json", "/proc/x", "s3://bucket/x", "~/x"):
        options = [f"--trainer.logger={logger}", f"--trainer.logger.save_dir={folder}"]
        add(f"{logger} {folder}", "mod", options, "trainer.logger.save_dir: ")
add_values("qa", "model.save_to", "model.save_to: ", "text.txt", "/proc/x", "s3://bucket/x")

# Config files


add("no time", "mod", ["--trainer.max_time", "00:00:00:00"], "trainer.max_time must be longer than nothing")
add("less than no time", "mod", ["--trainer.max_time", "{minutes: -5}"], "trainer.max_time must be longer than nothing")


def add_config(name: str, content: str | bytes | Prepare, said: str) -> None:
    prepare = file("w.yaml", content) if isinstance(content, str | bytes) else content
    add(f"config {name}", "mod", ["--config", "w.yaml"], said, prepare)


NO_KEYS = "w.yaml does not consist of keys and values"
add_config("latin-1", 'model: {init_args: {start: "é"}}'.encode("latin-1"), "w.yaml is not a text in UTF-8")
add_config("utf-16", "trainer: {max_steps: 1}".encode("utf-16"), "w.yaml is not a text in UTF-8")
add_config("binary", bytes(range(256)), "w.yaml is not a text in UTF-8")
add_config("null byte", "trainer: {max_steps: 3}\n\0", "w.yaml is not valid YAML")
for content in ("", "# nothing\n", "null\n", "- a\n", "5\n"):
    add_config(repr(content), content, NO_KEYS)
add_config("recursive", "trainer: &a {callbacks: *a}\n", "the alias *a stands inside what it names")
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 20)}]\n" for i in range(9))
add_config("alias bomb", BOMB, "more than 100000 values")
add_config("key twice", "trainer: {max_steps: 1}\ntrainer: {}\n", "near line 2: the key 'trainer' occurs twice")
add_config("deep key twice", "model: {init_args: {width: 8, width: 16}}\n", "the key 'width' occurs twice")
add_config("tab", "trainer:\n\tmax_steps: 1\n", "w.yaml is not valid YAML near line 2")
add_config("number as key", "1: 2\n", "Key must be a string")
add_config("huge integer", f"trainer: {{max_steps: {'9' * 5000}}}\n", "w.yaml is not valid YAML")
add_config("code", "trainer: !!python/object/apply:os.system ['touch x']\n", "w.yaml is not valid YAML")
add_config("two documents", "trainer: {}\n---\ntrainer: {}\n", "w.yaml is not valid YAML")
add_config("lone surrogate", 'trainer: {max_time: "\\ud800"}\n', "w.yaml is not valid YAML")
add_config("flow nesting", "trainer: " + "[" * 5000 + "]" * 5000, "w.yaml is not valid YAML")
add_config("block nesting", "- " * 5000 + "x", "more than 100 levels")
add_config("unfinished", "trainer: {max_steps: ", "w.yaml is not valid YAML")
add_config("undefined alias", "trainer: *x\n", "found undefined alias")
add_config("folder", lambda: Path("w.yaml").mkdir(), "w.yaml is not a file")
add_config("dangling link", lambda: Path("w.yaml").symlink_to("nowhere"), "link to a file that does not exist")
add_config("link loop", lambda: Path("w.yaml").symlink_to("w.yaml"), "link to a file that does not exist")
add_config("pipe", lambda: os.mkfifo("w.yaml"), "it is not a regular file")
add_config("model is a list", "model: [1]\n", "model: expected a class")
add_config("class is a number", "model: {class_path: 5}\n", "model: expected a class")
add_config("arguments are a list", "model: {init_args: [1]}\n", "model: expected a class")
for path, said in {"": "the path is empty", "s3://x/y.yaml": "is an address", "~/nope.yaml": "is not expanded"}.items():
    add(f"config at {path!r}", "mod", f"--config={path}", said)
add("bytes on the command line", "mod", "--model.start=\udcff", "is not a text in UTF-8")

# Optimizers, loggers, callbacks

add("optimizer of another kind", "mod", "--model.optimizer=torch.nn.Linear", "model.optimizer: ")
add(
    "optimizer misspelt",
    "mod",
    "--model.optimizer=AdmW",
    "model.optimizer: there is no Optimizer 'AdmW'; did you mean 'AdamW'",
)
add("sparse optimizer", "mod", "--model.optimizer=SparseAdam", "SparseAdam takes sparse gradients only")
for kind in ("torch.optim.Adafactor", "torch.optim.LBFGS"):
    said = " mixes the members of an ensemble: use AdamW, or set model.ensemble 1"
    add(f"{kind} of an ensemble", "mod", [f"--model.optimizer={kind}", "--model.ensemble=2"], said)
add("optimizer of matrices", "mod", "--model.optimizer=Muon", "model.optimizer: ")
add("logger misspelt", "mod", "--trainer.logger=CSVLoger", "there is no Logger 'CSVLoger'")
add("logger without its package", "mod", "--trainer.logger=CometLogger", "CometLogger: ")
add("logger is a callback", "mod", "--trainer.logger=EarlyStopping", "trainer.logger")


def add_callbacks(name: str, callbacks: str, said: str, base: str = "mod") -> None:
    content = f"trainer: {{callbacks: [{callbacks}]}}\n"
    add(f"callbacks: {name}", base, ["--config", "w.yaml"], said, file("w.yaml", content))


def callback(kind: str, arguments: str = "") -> str:
    return f"{{class_path: {kind}, init_args: {{{arguments}}}}}"


for kind in ("RoutingMonitor", "StabilityMonitor", "Throughput", "ModelCheckpoint"):
    add_callbacks(f"two {kind}", f"{callback(kind)}, {callback(kind)}", kind)
TWO_MONITORS = f"{callback('StabilityMonitor', 'settle: 1')}, {callback('StabilityMonitor')}"
add_callbacks("two states", TWO_MONITORS, "two StabilityMonitor that a checkpoint cannot tell apart, keep one")
TWO_SITES = ", ".join(callback("DiversityMonitor", f"site: {site}") for site in ("final_residual", "final_norm"))
add_callbacks("two sites", TWO_SITES, "DiversityMonitor")
GROUPS = "groups: {q: ['*.q_proj.*']}"
SITE = "site: final_residual"
CALLBACKS = {
    "of another kind": ("torch.nn.Linear", "in_features: 1, out_features: 1", "trainer.callbacks"),
    "a model": ("Separability", "", "trainer.callbacks"),
    "interval 0": ("Throughput", "every_n_steps: 0", "`every_n_steps` must be at least 1"),
    "infinite peak": ("Throughput", "peak_flops: .inf", "`peak_flops` must be positive"),
    "mode": ("EarlyStopping", "monitor: validation/loss, mode: up", "EarlyStopping: `mode` can be min, max"),
    "no monitor": ("ModelCheckpoint", "save_top_k: 3", "ModelCheckpoint"),
    "dirpath": ("ModelCheckpoint", "dirpath: mod.json/x", "trainer.callbacks[0].dirpath: cannot make the folder"),
    "dirpath address": ("ModelCheckpoint", "dirpath: 's3://x/y'", "s3://x/y is an address"),
    "decay below 0": ("EMAWeightAveraging", "decay: -1", "Invalid decay"),
    "decay NaN": ("EMAWeightAveraging", "decay: .nan", "trainer.callbacks[0].decay must be a number, not nan"),
    "duration": ("Timer", "duration: foo", "is not a valid duration"),
    "finder": ("LearningRateFinder", "", "learning rate finder"),
    "finetuning": ("BackboneFinetuning", "", "no attribute 'backbone'"),
    "no samples": ("QuickEval", "", "QuickEval needs `sample_eval(batch)`"),
    "no site": ("DiversityMonitor", "site: nope", "DiversityMonitor.site: no module matches 'nope'"),
    "freeze all": ("ParameterFreeze", "parameters: ['*']", "leaves nothing to train"),
    "freeze none": ("ParameterFreeze", "parameters: []", "names no parameter"),
    "freeze before 0": ("ParameterFreeze", "parameters: ['*'], at_step: -1", "at_step must be at least 0"),
    "no reference": ("ActivationClamp", f"{SITE}, mode: naive, reference: nope", "There is no reference 'nope'"),
    "text as reference": ("ActivationClamp", f"{SITE}, mode: naive, reference: mod.json", "cannot be read as a"),
    "reference beneath a file": ("ActivationReference", f"{SITE}, path: mod.json/x", "lies beneath a file"),
    "reference is a folder": ("ActivationReference", f"{SITE}, path: assets", "it is a folder"),
    "noise below 0": ("ActivationNoise", f"{SITE}, strength: -1", "ActivationNoise.strength must be at least 0"),
    "infinite noise": ("ActivationNoise", f"{SITE}, strength: .inf", "strength must be a finite number"),
    "stage": ("ActivationNoise", f"{SITE}, strength: 1, during: [train]", "expected one of fit, validate"),
    "seed": ("ActivationNoise", f"{SITE}, strength: 1, seed: -1", "`seed` must be an integer from 0"),
    "no group": ("DriftMonitor", "groups: {}", "DriftMonitor needs at least one group"),
    "empty group": ("DriftMonitor", "groups: {q: ['nope']}", "DriftMonitor.groups: no parameter matches 'nope'"),
    "infinite eps": ("DriftMonitor", f"{GROUPS}, eps: .inf", "`eps` must be positive"),
    "infinite level": ("StabilityMonitor", "reached: .inf", "StabilityMonitor.reached must be a finite number"),
    "settle": ("StabilityMonitor", "settle: -1", "StabilityMonitor.settle must be at least 0"),
    "levels": ("StabilityMonitor", "reached: 0.5, collapsed: 0.9", "must not be above"),
}
for name, (kind, arguments, said) in CALLBACKS.items():
    add_callbacks(name, callback(kind, arguments), said)

# Data


def add_data(name: str, base: str, path: str, said: str, prepare: Prepare | None = None) -> None:
    add(f"data {base} {name}", base, ["--data.source=file", f"--data.path={path}"], said, prepare)


for base in ("text", "qa"):
    add_data("missing", base, "nope", "no data file at 'nope' (data.path)")
    add_data("folder", base, "assets", "data.path: cannot read 'assets': it is a folder")
    add_data("pipe", base, "pipe", "it is not a regular file", lambda: os.mkfifo("pipe"))
    add_data("device", base, "/dev/zero", "it is not a regular file")
    add_data("empty", base, "d", "empty", file("d", ""))
add_data("address", "qa", "https://host/x.txt", "data.path: https://host/x.txt is an address")
add_data("home", "qa", "~/x.txt", "data.path: '~/x.txt' is not expanded")
add_data("long", "qa", "x" * 300, "is too long for a path")
add_data("empty path", "qa", "", "data.path: the path is empty")
GOOD = [json.dumps({"question": p.question, "answer": p.answer}) for p in (generate(0, "train", i) for i in range(3))]
UNUSABLE = {
    "lone surrogate": '{"question": "\\ud800?", "answer": "#### 1"}',
    "nesting": '{"question": ' + "[" * 40_000,
    "huge integer": '{"question": "1?", "answer": ' + "9" * 5000 + "}",
    "NaN": '{"question": NaN, "answer": "#### 1"}',
    "key twice": '{"question": "1?", "question": "2?", "answer": "#### 1"}',
    "empty question": '{"question": " ", "answer": "#### 1"}',
    "no answer": '{"question": "1?", "answer": "one"}',
    "two answers": '{"question": "1?", "answer": "9 (apples); 7 (pears)"}',
    "other columns": '{"Question": "1?", "Answer": 1}',
    "200 kB": json.dumps({"question": "1" * 200_000, "answer": "#### 1"}),
    "list": "[1, 2]",
}
for name, line in UNUSABLE.items():
    add_data(name, "qa", "d", "'d' (data.path) holds no problem: first line 1", file("d", line))
add_data("latin-1", "qa", "d", "holds no problem", file("d", '{"question": "é", "answer": "#### 1"}'.encode("latin-1")))
add_data("compressed", "qa", "d", "is compressed (gzip)", file("d", b"\x1f\x8b\x08\x00" + bytes(range(256))))
add_data("parquet", "qa", "d.parquet", "cannot read 'd.parquet' as parquet", file("d.parquet", b"PAR1" * 9))
TABLE = file("d.csv", "Body,answer\n1?,1\n")
add_data("columns", "qa", "d.csv", "there is no 'question', only 'Body', 'answer': set data.columns", TABLE)
add("misspelt column", "qa", ["--data.source=hub", "--data.columns={qestion: a}"], "data.columns has no 'qestion'")
add("splits of nothing", "qa", "--data.splits={test: a}", "data.splits is not read with data.source 'generated'")
add("answer format", "qa", "--data.answer_format=gsm8", "use 'gsm8k', 'last_number' or a regular expression")
TEST_ALONE = ["--data.source=file", "--data.test_path=d"]
add("test set alone", "qa", TEST_ALONE, "fit needs more than test problems", file("d", GOOD[0]))
add_data("one line", "qa", "d", "holds too few problems", file("d", GOOD[0]))
add(
    "text in latin-1",
    "text",
    ["--data.level=char", "--data.path=d"],
    "is not a text in UTF-8",
    file("d", b"\xe9" * 999),
)
add("short text", "text", "--data.path=d", "the text is too short", file("d", "short"))
add("model in a file", "tel", "--model.source.path=text.txt", "it is a file, name the folder")
add(
    "model at an address",
    "tel",
    "--model.source.path=https://host/m",
    "model.source.path: https://host/m is an address",
)
add(
    "bridge misspelt", "tel", "--model.bridge=TokenBridg", "there is no Bridge 'TokenBridg'; did you mean 'TokenBridge'"
)
add("bridge abstract", "tel", "--model.bridge=Bridge", "Bridge is an abstract class: name one of its subclasses")
add("model folder misspelt", "tel", "--model.target.path=assets/pair/targt", "there is no such folder")
add("model of no name", "tel", "--model.target.path=a b", "neither a folder nor a name on the hub")


@pytest.fixture(scope="module")
def parsers() -> dict[str, object]:
    return {}


@pytest.fixture
def folder(tmp_path, monkeypatch, parsers):
    """Change to a folder with the configs, and leave out what takes longer than most mistakes."""
    make = CrosstalkCLI.setup_parser

    def setup_parser(self, *args):
        if not parsers:
            make(self, *args)
            names = "parser", "_subcommand_parsers", "_subcommand_method_arguments"
            parsers.update({name: getattr(self, name) for name in names})
        vars(self).update(parsers)

    monkeypatch.setattr(CrosstalkCLI, "setup_parser", setup_parser)
    monkeypatch.setattr(
        CrosstalkCLI, "config_dump", {"data": {}, "model": {}}, raising=False
    )  # for hyperparameters in checkpoints
    monkeypatch.setattr("sys.argv", ["main.py"])
    monkeypatch.delenv("CROSSTALK_RUN_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, text in BASES.items():
        Path(f"{name}.json").write_text(text)
    Path("text.txt").write_text("the cat sat on the mat. " * 100)
    Path("assets").symlink_to(ASSETS)
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the kind and the content of everything in a folder, links not followed."""
    found = {}
    for path in folder.rglob("*"):
        if path.relative_to(folder).parts[0] != "assets":
            regular = path.is_file() and not path.is_symlink()
            found[str(path)] = path.lstat().st_mode, path.read_bytes() if regular else b""
    return found


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_is_one_sentence_and_leaves_nothing(folder, capsys, name):
    base, options, said, prepare = MISTAKES[name]
    if prepare is not None:
        prepare()
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        main.main(["fit", "--config", f"{base}.json", *options])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in errors
    sentences = errors[errors.index("error: ") :].splitlines()
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
    assert len(sentences) <= 2
    assert said in sentences[0]
    assert contents(folder) == before


def test_there_are_as_many_mistakes_as_promised():
    assert len(MISTAKES) >= 150
