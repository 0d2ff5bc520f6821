"""Triton keeps a compiled function under a name made of its arguments; no two kinds of arguments have the same name.

Triton 3.6 makes the name of what is in tuples one after another, so (a, (), b) and (a, b, ()) have one. Its interpreter
calls functions as they are and cannot show this, and a GPU shows it only as wrong numbers.
"""

from unittest.mock import patch

import pytest
import torch
from triton import language
from triton.compiler import ASTSource
from triton.compiler.code_generator import CodeGenerator

from benchmarks.phase_scan_registers import VARIANTS, compile_call, record_calls


class Translated(Exception):
    """Ends a compilation after the translation to Triton's own instructions."""


def parts(value, path=()):
    """Returns the type of a tensor, the place and text of anything else, or a nested tuple of what is in a tuple."""
    if isinstance(value, (tuple, language.tuple)):
        return tuple(parts(value[place], (*path, place)) for place in range(len(value)))
    return str(value.type) if isinstance(value, language.tensor) else f"{path} {value!r}"


def leaves(kind):
    """Returns what Triton's name keeps of a nested tuple."""
    return [kind] if isinstance(kind, str) else [leaf for one in kind for leaf in leaves(one)]


def names(kernel, how, arguments):
    """Translates a kernel; returns the kinds of arguments of each name."""
    found = {}
    translate, call = ASTSource.make_ir, CodeGenerator.call_JitFunction

    def make_ir(*arguments, **options):
        translate(*arguments, **options)
        raise Translated

    def record(self, function, args, kwargs, *others, **more):
        kinds = parts((*args, *kwargs.values()))
        found.setdefault((function, *kwargs, *leaves(kinds)), set()).add(kinds)
        return call(self, function, args, kwargs, *others, **more)

    with (
        patch.object(ASTSource, "make_ir", make_ir),
        patch.object(CodeGenerator, "call_JitFunction", record),
        pytest.raises(Translated),
    ):
        compile_call(kernel, how, arguments, 90)
    return found


@pytest.mark.parametrize("variant", ["all", "window, all"])
def test_a_name_belongs_to_one_kind_of_arguments(variant, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    for call in record_calls(torch.float32, **VARIANTS[variant]):
        found = names(*call)
        assert len(found) > 10
        assert not [name for name, kinds in found.items() if len(kinds) > 1]
