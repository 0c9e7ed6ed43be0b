"""Signatures of what generate() asks for them, seven times a call; Python would make each anew."""

import inspect
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def with_known_signature(function: Function) -> Function:
    """`function` itself, whose `inspect.signature` is at hand from now on."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # inspect knows it
    return function
