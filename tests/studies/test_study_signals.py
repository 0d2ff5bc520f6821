"""Signals to a study, in a child that imports next to nothing."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

CHILD = """
import signal, sys, time
from lightning_modules.core.signals import Interrupted, Signals
try:
    with Signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), "call it again to continue") as signals:
        signals.before_end = lambda: print("ended the runs", flush=True)
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("saving", flush=True)
            time.sleep(float(sys.argv[1]))
except Interrupted as ended:
    sys.exit(ended.exit_code)
"""


def start(saving, ignored=()):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(saving)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ],
    )
    assert child.stdout.readline() == "begun\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_study_in_order_and_is_no_other_when_it_comes_twice_in_a_moment(number):
    child = start(saving=0.3)
    child.send_signal(number)
    child.send_signal(number)
    shown, errors = child.communicate(timeout=30)
    assert (shown, errors, child.returncode) == ("saving\n", "", 128 + number)


def test_a_second_signal_ends_it_at_once():
    child = start(saving=60)
    child.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    child.send_signal(signal.SIGINT)
    shown, errors = child.communicate(timeout=30)
    assert (shown, child.returncode) == ("saving\nended the runs\n", 130)
    assert errors == "\nended at once: call it again to continue\n"


def test_a_signal_that_is_ignored_stays_so():
    """Under `nohup`, the end of a terminal does not end a study."""
    child = start(saving=0, ignored=(signal.SIGHUP,))
    child.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 143
