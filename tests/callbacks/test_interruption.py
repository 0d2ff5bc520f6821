"""A signal ends a run in order: at the end of a step, with a checkpoint and a record, and in any case."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from conftest import QUIET, ROOT
from lightning import Callback, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from toy_fit import SIZES, StopAt, Stopped, assert_same, fit, held

from callbacks.interruption import SIGNALS, Interruption, end_ranks
from callbacks.run_record import RunRecord
from datamodules import ModularArithmetic
from lightning_modules.core.signals import Interrupted, Signals
from lightning_modules.separability import Separability


class Send(Callback):
    """Sends a signal to this process, once, in a hook at a step."""

    def __init__(self, hook: str, step: int, number: int) -> None:
        def send(trainer, *_, **__):
            if trainer.global_step == step and not trainer.sanity_checking and not self.sent:
                self.sent = True
                signal.raise_signal(number)

        self.sent = False
        setattr(self, hook, send)


def interrupted(folder, hook, step, number, **options):
    """Return how a fit of twelve steps ends."""
    with Signals(SIGNALS, "") as signals, pytest.raises(Interrupted) as ended:
        fit(folder, 12, [RunRecord(), Send(hook, step, number), Interruption(signals)], **options)
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    return ended.value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_it_ends_with_the_step_and_a_checkpoint(tmp_path, number):
    error = interrupted(tmp_path, "on_train_batch_start", 5, number)
    assert error.exit_code == 128 + number
    assert held(tmp_path)["global_step"] == 6


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_before_backward", 0, 1),
        ("on_validation_batch_start", 8, 8),
        ("on_validation_end", 8, 9),
        ("on_train_batch_end", 11, 11),
        ("on_validation_batch_start", 12, 12),
    ],
    ids=["in the first step", "in a validation", "after one", "in the step before the last", "in the last validation"],
)
def test_wherever_it_comes_no_step_is_lost(tmp_path, hook, step, saved):
    whole = fit(tmp_path / "whole", 12)
    interrupted(tmp_path / "cut", hook, step, signal.SIGTERM)
    assert held(tmp_path / "cut")["global_step"] == saved
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert_same(whole, fit(tmp_path / "on", 12, ckpt_path=last))


def test_gradients_that_accumulate_are_completed(tmp_path):
    interrupted(tmp_path, "on_train_batch_start", 2, signal.SIGTERM, accumulate_grad_batches=3, limit_val_batches=0)
    assert held(tmp_path)["global_step"] == 3


def test_before_training_it_ends_at_once(tmp_path):
    interrupted(tmp_path, "on_fit_start", 0, signal.SIGTERM)
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_of_another_rank_ends_this_one_with_the_same_step(tmp_path):
    with Signals(SIGNALS, "") as signals:
        callback = Interruption(signals)
        callback._agree = lambda trainer, wish: trainer.global_step == 3
        with pytest.raises(Interrupted) as ended:
            fit(tmp_path, 12, [callback])
    assert (ended.value.number, signals.agreed) == (signal.SIGTERM, True)
    assert held(tmp_path)["global_step"] == 3


@pytest.mark.parametrize("hook", ["on_train_start", "on_test_start"])
@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_alone_speaks_of_a_signal(capfd, hook, first):
    with Signals(SIGNALS, "") as signals:
        getattr(Interruption(signals), hook)(SimpleNamespace(is_global_zero=first), None)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert ("SIGTERM: the run ends after this" in capfd.readouterr().err) == first


def test_the_processes_that_lightning_started_end_at_once():
    killed = []
    launcher = object.__new__(_SubprocessScriptLauncher)
    launcher.kill = killed.append
    for other in (None, SimpleNamespace(strategy=SimpleNamespace(launcher=None))):
        end_ranks(other)
    assert killed == []
    end_ranks(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    assert killed == [signal.SIGKILL]


def test_the_checkpoint_may_take_its_time_and_then_the_process_has_its_grace_again(tmp_path, monkeypatch, capfd):
    calls = []
    for name in ("suspend_deadline", "renew_deadline"):
        monkeypatch.setattr(Signals, name, lambda self, name=name: calls.append(name))
    monkeypatch.setattr("callbacks.interruption.LastCheckpoint.save", lambda self, trainer: calls.append("save"))
    interrupted(tmp_path, "on_train_batch_start", 2, signal.SIGTERM)
    assert calls == ["suspend_deadline", "save", "renew_deadline"]
    said = "SIGTERM: the run ends after this step, with a checkpoint; a second signal ends it at once"
    assert said in capfd.readouterr().err


def test_a_test_ends_with_the_batch_and_what_follows_at_once(tmp_path):
    class Ended(Callback):
        count = 0

        def on_test_batch_end(self, *_):
            self.count += 1

    def run(*callbacks):
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **QUIET)
        data = ModularArithmetic(p=13, batch_size=12, eval_batch_size=12)
        trainer.test(Separability(**SIZES), datamodule=data, verbose=False)

    ended = Ended()
    with Signals(SIGNALS, "") as signals, pytest.raises(Interrupted):
        run(Send("on_test_batch_start", 0, signal.SIGTERM), ended, Interruption(signals))
    assert ended.count == 1
    with Signals(SIGNALS, "") as signals:
        run(ended, Interruption(signals))
        assert ended.count > 2
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("fails", [True, False])
def test_after_a_fit_it_ends_at_once(tmp_path, fails):
    with Signals(SIGNALS, "") as signals:
        with pytest.raises(Stopped) if fails else contextlib.nullcontext():
            fit(tmp_path, 3, [Interruption(signals), *([StopAt("on_train_batch_start", 2)] if fails else [])])
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


def test_handlers_come_back_and_ignored_signals_stay_ignored():
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(SIGNALS, ""):
            assert signal.getsignal(signal.SIGTERM) != before
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert signal.getsignal(signal.SIGTERM) == before


HANGS = """
import ctypes, signal, threading, time
from lightning_modules.core import signals

signals.REPEATED = 0.1
with signals.Signals((signal.SIGTERM, signal.SIGINT), "resume it", {grace}) as running:
    running.before_end = lambda: print("recorded", flush=True)
    running.hold("the run ends after this step")
    signal.raise_signal(signal.SIGTERM)
    if {second}:
        threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    barrier = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_barrier_init(barrier, None, 2)
    libc.pthread_barrier_wait(barrier)  # never returns, and Python runs no handler meanwhile
"""


@pytest.mark.parametrize(("grace", "second"), [(60, True), (0.3, False)], ids=["a second signal", "no end in time"])
def test_a_run_that_hangs_is_ended(grace, second):
    script = textwrap.dedent(HANGS.format(grace=grace, second=second))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == (130 if second else 143)
    assert ended.stdout == "recorded\n"
    kept = "SIGTERM: the run ends after this step; a second signal ends it at once"
    assert ended.stderr.split("\n") == ["", kept, "", "ended at once: resume it", ""]
