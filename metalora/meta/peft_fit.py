"""One-line errors for methods of peft that fail with the installed packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn

from metalora._checks import first_line

_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@contextmanager
def insertion(
    function: str, peft: ModuleType, model: nn.Module, peft_config: Any
) -> Iterator[None]:
    """Within, peft puts the layers of a method into ``model``.

    A ValueError of peft's own describes the configuration and is raised unchanged.

    Raises:
        RuntimeError: for any other error; it names the method, the model and their versions.
    """
    try:
        yield
    except (ValueError, *_OUT_OF_MEMORY):
        raise
    except Exception as error:
        message = f"{_pair(peft, model, peft_config)} cannot be set up: {_reason(error)}"
        raise RuntimeError(f"{function}: {message}; {_ADVICE}") from error


def check_first_call(
    function: str, peft: ModuleType, adapted: Any, model: nn.Module, peft_config: Any
) -> None:
    """Watches the first call of ``adapted`` for a method that does not work on ``model``.

    If the call fails and succeeds without the adapters, the method is at fault: a RuntimeError then
    names the method, the model and their versions. Errors that occur either way, such as a token
    beyond the vocabulary, and all errors of later calls are raised unchanged.

    Args:
        function: what error messages call the caller.
        peft: the package.
        adapted: the ``peft.PeftModel``.
        model: the plain model in it.
        peft_config: the ``peft.PeftConfig``.
    """

    def first_call(*args: Any, **kwargs: Any) -> Any:
        del adapted.forward  # the class's own again
        try:
            return adapted.forward(*args, **kwargs)
        except _OUT_OF_MEMORY:
            raise
        except Exception as error:
            if not _runs_without(adapted, args, kwargs):
                raise
            message = f"{_pair(peft, model, peft_config)} fails where the model alone does not"
            raise RuntimeError(f"{function}: {message}: {_reason(error)}; {_ADVICE}") from error

    adapted.forward = first_call


_ADVICE = "choose another method, or other versions of these packages"


def _runs_without(adapted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # Prompts stand before the model, and disable_adapter needs more of a model to take them away.
    prompts = adapted.active_peft_config.is_prompt_learning
    try:
        with torch.no_grad(), nullcontext() if prompts else adapted.disable_adapter():
            adapted.get_base_model()(*args, **kwargs)
    except Exception:
        return False
    return True


def _pair(peft: ModuleType, model: nn.Module, peft_config: Any) -> str:
    """For example "PREFIX_TUNING of peft 0.21.2 on RobertaModel of transformers 5.24.0"."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    packages -= {"torch", "peft"}
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in packages}
    found = sorted(name for name in packages if versions[name])
    of = " and ".join(f"{name} {versions[name]}" for name in found) or f"torch {torch.__version__}"
    return f"{kind_of(peft_config)} of peft {peft.__version__} on {type(model).__name__} of {of}"


def kind_of(peft_config: Any) -> str:
    """What peft calls the method, such as "LORA"."""
    return str(getattr(peft_config.peft_type, "value", peft_config.peft_type))


def _reason(error: Exception) -> str:
    kind, line = type(error).__name__, first_line(error).rstrip(".")
    return kind if line == kind else f"{kind}: {line}"
