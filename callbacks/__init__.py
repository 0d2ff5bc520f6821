"""Interventions, monitors and records; they work on any line, by module and parameter name."""

from callbacks.activation_clamp import ActivationClamp
from callbacks.activation_noise import ActivationNoise
from callbacks.activation_reference import ActivationReference
from callbacks.agent_chain import AgentChain
from callbacks.best_validation import BestValidation
from callbacks.bits_by_position import BitsByPosition
from callbacks.curriculum import Curriculum
from callbacks.diversity_monitor import DiversityMonitor
from callbacks.drift_monitor import DriftMonitor
from callbacks.gates import Gates
from callbacks.gradient_ratio import GradientRatio
from callbacks.group_accuracy import GroupAccuracy
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.parameter_freeze import ParameterFreeze
from callbacks.parameter_rounding import ParameterRounding
from callbacks.parameter_swap import ParameterSwap
from callbacks.phase_monitor import PhaseMonitor
from callbacks.quick_eval import QuickEval
from callbacks.recall_grid import RecallGrid
from callbacks.routing_monitor import RoutingMonitor
from callbacks.run_record import RunRecord
from callbacks.soft_token_map import SoftTokenMap
from callbacks.stability_monitor import StabilityMonitor
from callbacks.state_probe import StateProbe
from callbacks.step_phases import StepPhases
from callbacks.text_monitor import TextMonitor
from callbacks.throughput import Throughput

__all__ = [
    "ActivationClamp",
    "ActivationNoise",
    "ActivationReference",
    "AgentChain",
    "BestValidation",
    "BitsByPosition",
    "Curriculum",
    "DiversityMonitor",
    "DriftMonitor",
    "Gates",
    "GradientRatio",
    "GroupAccuracy",
    "LastCheckpoint",
    "ParameterFreeze",
    "ParameterRounding",
    "ParameterSwap",
    "PhaseMonitor",
    "QuickEval",
    "RecallGrid",
    "RoutingMonitor",
    "RunRecord",
    "SoftTokenMap",
    "StabilityMonitor",
    "StateProbe",
    "StepPhases",
    "TextMonitor",
    "Throughput",
]
