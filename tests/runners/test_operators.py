"""What runners call in a backend is what backends have."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest

from guardengine import kernels
from guardengine.runners.operators import FusedOperators, Operators


def methods(protocol: type[Any]) -> dict[str, list[inspect.Parameter]]:
    """A protocol's own functions and their parameters, but for `self`."""
    return {
        name: list(inspect.signature(method).parameters.values())[1:]
        for name, method in vars(protocol).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def fits(wanted: list[inspect.Parameter], function: Any) -> bool:
    """Whether a function takes what callers pass: these parameters, and no other that has no default."""
    own = inspect.signature(function).parameters
    names = [parameter.name for parameter in wanted]
    kinds = [
        own[name].kind == parameter.kind for name, parameter in zip(names, wanted, strict=True) if name in own
    ]
    defaults = [
        own[p.name].default is not p.empty for p in wanted if p.name in own and p.default is not p.empty
    ]
    rest = [parameter for name, parameter in own.items() if name not in names]
    positional = [name for name, p in own.items() if p.kind != p.KEYWORD_ONLY]
    return (
        set(names) <= set(own)
        and all(kinds)
        and all(defaults)
        and all(parameter.default is not parameter.empty for parameter in rest)
        and positional == [p.name for p in wanted if p.kind != p.KEYWORD_ONLY]
    )


def backends() -> list[str]:
    has_triton = importlib.util.find_spec("triton") is not None
    return [name for name in kernels.BACKENDS if name != "triton" or has_triton]


@pytest.mark.parametrize("backend", backends())
def test_every_backend_has_the_operators(backend: str) -> None:
    assert set(methods(Operators)) == set(kernels.OPERATORS)
    module = kernels.load(backend)
    for name, parameters in methods(Operators).items():
        assert fits(parameters, getattr(module, name)), name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_triton_backend_has_the_fused_operators() -> None:
    module = kernels.load("triton")
    for name, parameters in methods(FusedOperators).items():
        assert fits(parameters, getattr(module, name)), name
    for name in FusedOperators.__annotations__:
        assert isinstance(getattr(module, name), type), name


def test_a_function_of_other_parameters_does_not_fit() -> None:
    def rms_norm(x: Any, weight: Any, eps: float) -> Any: ...
    def renamed(x: Any, weights: Any, eps: float) -> Any: ...
    def longer(x: Any, weight: Any, eps: float, out: Any) -> Any: ...
    def swapped(weight: Any, x: Any, eps: float) -> Any: ...

    wanted = methods(Operators)["rms_norm"]
    assert fits(wanted, rms_norm)
    for other in (renamed, longer, swapped):
        assert not fits(wanted, other)
