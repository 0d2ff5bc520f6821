"""Interventions, monitors and records; they work on any line, by module and parameter name."""

from callbacks.activation_clamp import ActivationClamp
from callbacks.activation_reference import ActivationReference
from callbacks.diversity_monitor import DiversityMonitor
from callbacks.parameter_freeze import ParameterFreeze
from callbacks.quick_eval import QuickEval
from callbacks.run_record import RunRecord
from callbacks.throughput import Throughput

__all__ = [
    "ActivationClamp",
    "ActivationReference",
    "DiversityMonitor",
    "ParameterFreeze",
    "QuickEval",
    "RunRecord",
    "Throughput",
]
