"""Interventions, monitors and records; they work on any line, by module and parameter name."""

from callbacks.activation_clamp import ActivationClamp
from callbacks.activation_reference import ActivationReference
from callbacks.parameter_freeze import ParameterFreeze
from callbacks.run_record import RunRecord
from callbacks.throughput import Throughput

__all__ = [
    "ActivationClamp",
    "ActivationReference",
    "ParameterFreeze",
    "RunRecord",
    "Throughput",
]
