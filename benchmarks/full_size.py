"""Samples per second and memory of a bridge's training between Llama 3.1 8B's and Mistral 7B's true shapes.

    python -m benchmarks.full_size --data gsm8k/train.jsonl [--ways V15 V16] [--batches 2 8 16 32 64] [--json FILE]
    torchrun --nproc-per-node 2 -m benchmarks.full_size --data gsm8k/train.jsonl --ways V15 --batches 32 --devices 2

Weights are random; the text is that of GSM8K with a byte-level BPE that the script trains on it. Ways:

- `V15`: the bridge of `presets/telepathy/llama31_mistral7b.yaml`, at most 128 soft tokens, trained by the module
  `Telepathy` and Lightning's Trainer in `bf16-mixed`, as `fit` does it;
- `V16`: one soft token per source token, by a `TokenBridge` of 50 million parameters;
- `V15 cached`: the states of the source come from files;
- `V15 cudnn`: attention by cuDNN where PyTorch prefers it, which `Pretrained` leaves out;
- `... compiled`: the same as V15 or V16, with `compile: true` in both models;
- `notes`: the way of the notes. The whole source runs and all its hidden states are kept, rows are padded to the
  longest, the target gives logits at all positions, and the bridge trains in bf16 with AdamW.

Every row trains on the same 128 problems per device once, after two steps with the largest of its batches. Each row is
printed, and written to FILE, as soon as it is measured. Ways run in the order of `--ways`, each with `--max_tokens`
before `--batches`, then profiles. A batch that does not fit into memory, and those above it, get the row `out of
memory`.
"""

import argparse
import gc
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.full_size_notes import notes_steps
from benchmarks.full_size_pair import Kept, write_pair, write_problems
from benchmarks.full_size_steps import Parts, Staying
from benchmarks.step_phases import Kernels, Phases
from benchmarks.step_rates import HEAD, WARMUP, Part, Rates, process_seconds, tell
from callbacks.divergence import Diverged, Divergence
from lightning_modules.pretrained.loading_device import loading_to
from lightning_modules.telepathy import PerceiverBridge, Telepathy, TokenBridge

WAYS = ("V15", "V16", "V15 cached", "notes", "V15 cudnn", "V15 compiled", "V16 compiled")
OBJECTIVES: dict[str, Any] = {
    "V15": {"lm": 1.0, "batch_diversity": 0.1, "contrastive": 0.1},
    "V16": {"lm": 1.0},
}
SIZES: dict[str, dict[str, Any]] = {  # of the bridges
    "V15": {"soft_tokens": 128, "span": 192, "depth": 4, "heads": 32, "width": 4096, "hidden": 4096},
    "V16": {"tokens_per_source": 1, "hidden": 3072},
}
TINY_SIZES: dict[str, dict[str, Any]] = {
    "V15": {"soft_tokens": 32, "depth": 4, "width": 64, "hidden": 64},
    "V16": {"hidden": 64},
}
ADAMW = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.01)
PROBLEMS = 128  # that each batch size trains on once, per device
LIMIT = 80  # GiB of a card; larger ones are not profiled
TIMED, PROFILED = 4, 2  # steps of a profile: by phase, then by kernel


class Bench:
    """The models of the pair and its data, in a folder; both models are made once for all ways that can share them.

    Attributes:
        found: What is written to the file: rows, profiles, and seconds from the start of the program (`at`, `ends`).
    """

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        self.layers = [max(1, options.layers * quarter // 4) for quarter in (1, 2, 3)]
        size = write_pair(folder, options.data, options.layers, options.tiny)
        # Batches of a number of positions first: a batch that does not fit ends its way
        self.parts = [Part(PROBLEMS, tokens) for tokens in options.max_tokens] + [Part(r) for r in options.batches]
        count = PROBLEMS * options.devices + 1  # one is for validation
        self.problems = write_problems(folder, options.data, count)
        self.bridges: dict[str, Any] = {}
        self.found: dict[str, Any] = {"options": str(options), "rows": [], "profiles": [], "ends": {}}
        self.mark("text and tokenizer")
        self.free()
        tell(f"tokenizer: {size} tokens; source layers {self.layers}; {count - 1} problems\n")

    def mark(self, what: str) -> None:
        """Keep the seconds from the start of the program to the end of this part of the start."""
        self.found["ends"].setdefault(what, round(process_seconds(), 1))

    def keep(self, row: dict[str, Any]) -> None:
        """Keep a row of the table."""
        self.found["rows"].append(row | {"at": round(process_seconds(), 1)})
        self.write()

    def write(self) -> None:
        """Write the figures to the file, in the first process alone."""
        if self.options.json and not int(os.environ.get("LOCAL_RANK", 0)):
            self.options.json.write_text(json.dumps(self.found, indent=1))

    def free(self, compiled: bool = False) -> None:
        """Forget the models; the next way loads them again."""
        path, names = str(self.folder), ("source", "target")
        made = [Kept(f"{path}/{name}", random_init=True, dtype="bfloat16", compile=compiled) for name in names]
        self.source, self.target = made
        self.compiled = compiled
        torch.compiler.reset()  # graphs of the models before
        self.release()

    def release(self) -> None:
        """Give all free memory back, or the next way would find it in blocks of other sizes and move it about."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def bridge(self, name: str, *parts: Any) -> Any:
        """Return the bridge of V15 or V16; it is made once."""
        if name not in self.bridges:
            kind: Any = PerceiverBridge if name == "V15" else TokenBridge
            self.bridges[name] = kind(*parts, **(TINY_SIZES if self.options.tiny else SIZES)[name])
            self.mark(f"bridge {name}")
        for other in self.bridges.keys() - {name}:
            self.bridges[other].cpu()  # its memory does not count
        return self.bridges[name].float()  # the notes' way leaves it in bf16

    def module(self, way: str) -> Telepathy:
        """Return the module of a way."""
        name, compiled, cached = way[:3], "compiled" in way, "cached" in way
        if compiled != self.compiled:
            self.free(compiled)
        self.source.load_first_layers(self.layers)  # onto the device, before they are split
        self.target.load_causal_lm()
        self.mark("models")
        torch.backends.cuda.enable_cudnn_sdp("cudnn" in way)
        module = Staying(
            self.source,
            self.target,
            partial(self.bridge, name),
            self.layers,
            objectives=OBJECTIVES[name],
            optimizer=partial(ADAMW, fused=True),
            warmup_steps=2,
            schedule="constant",
            cache_source=cached,
            shard_frozen=self.options.shard,
        )
        if cached:
            self.source.kept = None  # the module frees it
        return module

    def parts_of(self, way: str) -> list[Part]:
        """Return the sizes of batches; the notes know no batches of a number of positions."""
        return [replace(part) for part in self.parts if way != "notes" or part.tokens is None]

    def run(self, way: str, parts: list[Part], callbacks: Sequence[Callback] = ()) -> Rates:
        """Train in one way with all sizes of batches, and return their rows, printed unless there are callbacks."""
        self.release()  # trainer and module of the way before are garbage only once `run` has returned
        rates = Rates(way, parts, self.options.peak, keep=None if callbacks else self.keep)
        short, diverged = False, ""
        try:
            if way == "notes":
                self.free()
                notes_steps(self.source, self.target, self.layers, partial(self.bridge, "V15"), self.problems, rates)
            else:
                self._fit(way, parts, [Divergence(), rates, *callbacks])
        except torch.cuda.OutOfMemoryError:
            short = True  # what the error holds is free behind this block
        except Diverged as error:
            diverged = f"{way}: {error}"
        if short:
            rates.out_of_memory()
        if diverged:
            self.found.setdefault("diverged", []).append(diverged)
            tell(diverged)
            self.bridges.clear()  # the next way does not start from what is not finite
        if way == "notes":
            self.free()  # the whole source
        for bridge in self.bridges.values():
            bridge.zero_grad()
        self.write()
        return rates

    def _fit(self, way: str, parts: list[Part], callbacks: list[Callback]) -> None:
        module, devices = self.module(way), self.options.devices
        names = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        quiet: dict[str, Any] = dict.fromkeys(names, False)
        trainer = Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=devices,
            strategy=DDPStrategy(gradient_as_bucket_view=True) if devices > 1 else "auto",
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            max_epochs=1,
            limit_val_batches=0,
            callbacks=callbacks,
            use_distributed_sampler=False,
            **quiet,
        )
        trainer.fit(module, datamodule=Parts(parts, **self.problems))

    def profile(self, way: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Print where the time goes in the fastest of these rows that needs at most 80 GiB."""
        fits = [row for row in rows if row["gib"] is not None and not row["gib"] > LIMIT]
        if not fits:
            return {}
        best = max(fits, key=lambda row: row["samples_per_s"])["rows"]
        part = next(part for part in self.parts if part.name == best)
        part = Part(part.rows, part.tokens, WARMUP + TIMED + PROFILED)
        phases, kernels = Phases(WARMUP, WARMUP + TIMED), Kernels(WARMUP + TIMED)
        self.run(way, [part], [phases, kernels])
        spent = phases.milliseconds()
        tell(f"\n{way}, batches of {best}: ms per step by phase\n\n| {' | '.join(spent)} |\n|{'---|' * len(spent)}")
        tell(f"| {' | '.join(f'{value:.1f}' for value in spent.values())} |\n")
        tell("| kernel | ms per step | calls |\n|---|---|---|")
        largest = kernels.rows(PROFILED)
        for name, value, calls in largest:
            tell(f"| `{name}` | {value:.2f} | {calls} |")
        tell("")
        return {"way": way, "rows": best, "phases": spent, "kernels": largest}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's file of training problems")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["V15", "V16", "V15 cached", "notes"])
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 8, 16, 32, 64], help="rows per device")
    parser.add_argument("--max_tokens", type=int, nargs="*", default=[], help="also batches of so many positions")
    parser.add_argument("--profile", nargs="*", choices=set(WAYS) - {"notes"}, default=[], help="ways to profile")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, under DDP; start one process each with torchrun")
    parser.add_argument("--shard", action="store_true", help="split the frozen models over the devices (FSDP)")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s for the MFU; those of an H200")
    parser.add_argument("--layers", type=int, default=32, help="layers of both models")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try this script on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"--data: there is no file {options.data}; GSM8K's train.jsonl is one")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as name, loading_to(device):
        bench = Bench(Path(name), options)
        found = bench.found
        tell(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}")
        for way in options.ways:
            bench.run(way, bench.parts_of(way))
        first = next((row["first_step"] for row in found["rows"] if "first_step" in row), float("nan"))
        tell(f"\nseconds from the start of the program to the end of the first step: {first:.1f}")
        tell(", ".join(f"{what}: {seconds}" for what, seconds in found["ends"].items()))
        for way in options.profile:
            found["profiles"].append(bench.profile(way, [row for row in found["rows"] if row["way"] == way]))
            bench.write()


if __name__ == "__main__":
    main()
