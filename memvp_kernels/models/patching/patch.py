"""Put a mixin in front of one instance's class, and take it away again.

No other instance notices. The combined class keeps the name and module of the class that it stands in for, because
device maps, sharding policies, the choice of a loss and a saved config's architectures all go by class name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = [
    "Patch",
    "give_forward",
    "is_patched",
    "keeps_its_forward",
    "patch",
    "replaced_forward",
    "take_forward",
    "unpatch",
]


class Patch(nn.Module):
    """Base of the mixins. Pickles and copies as (mixin, base class), since the combined class cannot be imported."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not is_patched(self):  # a class derived from ours (FSDP's) pickles its own way
            return reduced
        mixin, base = type(self).__bases__
        return (_blank, (mixin, base), *reduced[2:])


def patch(module: nn.Module, mixin: type[Patch]) -> None:
    """Make ``module`` an instance of ``mixin`` in front of its present class."""
    module.__class__ = _combined(mixin, type(module))
    _rebind(module)


def keeps_its_forward(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's forward, possibly inside an accelerate hook (device maps, offloading)."""
    forward = vars(module).get("forward")
    if forward is None:
        return True
    inner = vars(module).get("_old_forward")
    by_accelerate = getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
    return by_accelerate and getattr(inner, "__func__", None) is type(module).forward


_REPLACED = "_replaced_forward"


def take_forward(module: nn.Module) -> None:
    """Let the class of ``module`` run where a library has set a forward on the instance; its mixin calls that one."""
    if not keeps_its_forward(module):
        vars(module)[_REPLACED] = vars(module).pop("forward")


def give_forward(module: nn.Module) -> None:
    """Undo :func:`take_forward`."""
    if _REPLACED in vars(module):
        vars(module)["forward"] = vars(module).pop(_REPLACED)


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that :func:`take_forward` took."""
    taken = vars(module).get(_REPLACED)
    # a bound method unpickles by its name, as the class's own
    return None if getattr(taken, "__func__", None) is type(module).forward else taken


def is_patched(module: nn.Module) -> bool:
    """Whether ``module``'s class is one that :func:`patch` created."""
    return "_patched_class" in type(module).__dict__


def unpatch(module: nn.Module) -> None:
    """Undo :func:`patch`. Any other module stays as it is.

    Raises:
        RuntimeError: something else has changed the instance's class since.
    """
    if is_patched(module):
        module.__class__ = vars(type(module))["_patched_class"]
        _rebind(module)
    elif isinstance(module, Patch):
        raise RuntimeError(
            f"this {type(module).__name__} has been given another class since it was wrapped (sharding does this); "
            "undo that before unload()"
        )


def _rebind(module: Any) -> None:
    """An accelerate hook calls the forward that it found bound to the instance: let that be the present class's."""
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)


_COMBINED: dict[tuple[type, type], Any] = {}


def _combined(mixin: type[Patch], base: type[nn.Module]) -> Any:
    found = _COMBINED.get((mixin, base))
    if found is not None:
        return found

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """type(model)(config) makes a plain model: nothing of a new instance has been patched."""
        return base(*args, **kwargs) if "_patched_class" in vars(cls) and (args or kwargs) else base.__new__(cls)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__new__": new,
        "_patched_class": base,
    }
    combined = _COMBINED[mixin, base] = type(base.__name__, (mixin, base), namespace)
    return combined


def _blank(mixin: type[Patch], base: type[nn.Module]) -> Any:
    kind = _combined(mixin, base)
    return kind.__new__(kind)
