"""An interpreter for Gluon kernels on Hopper: their Python source runs on CPU tensors, one thread block after the other.

Triton has one for its own language, none for Gluon. This one is made to find wrong protocols: what is asynchronous happens at the most
inconvenient time (`Schedule`), a byte of shared memory is at the address that its layout says, and two accesses that nothing orders
raise in any schedule. Tests only.

    with interpreted(Schedule("random", seed=1)):
        kernel[(programs,)](descriptor, tensor, rows, BLOCK=128, num_warps=8)

What it can't find: whether Triton compiles the kernel (layouts of registers are checked where two meet, not where a result's would
have to be inferred), anything about registers or speed, clusters of more than one thread block; what a program reads of its own TMA stores; a
release that is missing where a ring never wraps: run more steps than there are stages.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction

from tests.triton.gluon import machine
from tests.triton.gluon.device_memory import DeviceMemory
from tests.triton.gluon.hopper import Descriptor
from tests.triton.gluon.language import REPLACED, kernel_range
from tests.triton.gluon.machine import Deadlock, Machine, ProtocolError, Schedule
from tests.triton.gluon.pointers import Pointer
from tests.triton.gluon.races import Race
from tests.triton.gluon.values import Block, Scalar, dtype_of

__all__ = ["LATEST", "Deadlock", "ProtocolError", "Race", "Schedule", "interpreted", "run"]

#: Everything as late as possible, and the default partition first.
LATEST = Schedule()

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "debug", "enable_fp_fusion", "launch_cooperative_grid")


def run(kernel: Any, grid: Any, *arguments: Any, schedule: Schedule = LATEST, **named: Any) -> None:
    """Run a Gluon kernel on CPU tensors.

    Args:
        kernel: what `gluon.jit` returned.
        grid: programs in up to three dimensions; a tuple or, as for a launch, a function of the named arguments.
        arguments, named: as in a launch, `num_warps` and the like among them.
    """
    options = {name: named.pop(name) for name in _OPTIONS if name in named}
    bound = inspect.signature(kernel.fn).bind(*arguments, **named)
    bound.apply_defaults()
    sizes = grid(bound.arguments) if callable(grid) else grid
    sizes = (sizes,) if isinstance(sizes, int) else tuple(int(n) for n in sizes)
    # A test may have put something else in the place of a global since the last launch.
    _function.cache_clear()
    _namespace.cache_clear()
    code = _function(kernel.fn)
    constants = _constants(kernel.fn)
    values = {n: _plain(v) if n in constants else _argument(v) for n, v in bound.arguments.items()}
    memory = DeviceMemory()
    for program in itertools.product(*(range(n) for n in reversed(sizes))):
        block = Machine(schedule, tuple(reversed(program)), sizes, options.get("num_warps", 4), memory)
        machine.enter(block)
        try:
            code(**values)
            block.close()
        finally:
            machine.leave()


@contextlib.contextmanager
def interpreted(schedule: Schedule = LATEST) -> Iterator[None]:
    """Within it every launch of a Gluon kernel, `kernel[grid](...)`, is interpreted."""

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        run(self, grid, *arguments, schedule=schedule, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GluonJITFunction, "run", launch, raising=False)
        yield


def _argument(value: Any) -> Any:
    """What a kernel gets for a launch's argument."""
    if isinstance(value, Tensor):
        return Pointer.to_tensor(value)
    if hasattr(value, "block_shape") and hasattr(value, "layout"):
        return Descriptor(value)
    if isinstance(value, (bool, int, float)):
        return Scalar(value, dtype_of(value))
    if isinstance(value, tuple):
        items = [_argument(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if value is None:
        return None
    return _plain(value)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value


def _constants(fn: Callable[..., Any]) -> set[str]:
    """The parameters that are compile-time constants."""

    def is_constant(annotation: Any) -> bool:
        return annotation in (tl.constexpr, gl.constexpr) or (isinstance(annotation, str) and "constexpr" in annotation)

    return {name for name, annotation in fn.__annotations__.items() if is_constant(annotation)}


class _Function:
    """A function of device code, callable from interpreted code."""

    def __init__(self, fn: Any) -> None:
        self.fn, self.__name__, self.constants = fn, fn.__name__, _constants(fn)
        self.signature = inspect.signature(fn)
        self.code: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.code is None:
            self.code = _copied(self.fn)
        if self.constants:
            bound = self.signature.bind(*arguments, **named).arguments
            for name in self.constants:
                if isinstance(bound.get(name), (Scalar, Block)):
                    raise TypeError(
                        f"{machine.where()}: {self.__name__} takes a constant for {name}, not {bound[name]}"
                    )
        return self.code(*arguments, **named)


@functools.cache
def _function(fn: Any) -> _Function:
    return _Function(fn)


class _Methods(ast.NodeTransformer):
    """x.to(dtype) may be asked of a Python number, which a kernel's loop would have made a tensor."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute) or node.func.attr != "to":
            return node
        name = ast.copy_location(ast.Name("__to__", ast.Load()), node)
        return ast.copy_location(ast.Call(name, [node.func.value, *node.args], node.keywords), node)


@functools.cache
def _compiled(fn: Any) -> types.CodeType:
    """The definition of a function from its source, at the same lines; its defaults and annotations are left out."""
    lines, first = inspect.getsourcelines(fn)
    tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), first - 1)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    parameters = definition.args
    for parameter in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs):
        parameter.annotation = None
    parameters.defaults, parameters.kw_defaults = [], [None] * len(parameters.kwonlyargs)
    return compile(_Methods().visit(tree), inspect.getsourcefile(fn) or "kernel", "exec")


def _copied(fn: Any) -> Any:
    """The function with globals that are the interpreter's."""
    code = _compiled(fn)
    outer = dict(fn.__globals__)
    outer.update(zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__ or ()), strict=True))
    scope: dict[str, Any] = {"__gluon_interpreted__": True, "__name__": fn.__module__}
    exec(code, scope)
    copy = scope[fn.__name__]
    scope.update({name: _converted(outer[name]) for name in _names(code) if name in outer})
    scope.update(range=kernel_range, __to__=REPLACED[id(gl.cast)][1])
    copy.__defaults__ = fn.__defaults__ and tuple(_plain(v) for v in fn.__defaults__)
    copy.__kwdefaults__ = fn.__kwdefaults__ and {n: _plain(v) for n, v in fn.__kwdefaults__.items()}
    return copy


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


class _Namespace:
    """A module as interpreted code sees it."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = _converted(getattr(self._module, name))
        setattr(self, name, value)
        return value


@functools.cache
def _namespace(module: types.ModuleType) -> _Namespace:
    return _Namespace(module)


def _converted(value: Any) -> Any:
    """What a global of device code is when interpreted; Triton's functions are known by identity."""
    found = REPLACED.get(id(value))
    if found is not None:
        return found[1]
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(value, types.ModuleType):
        return _namespace(value)
    if type(value).__name__ in ("GluonJITFunction", "JITFunction", "InterpretedFunction"):
        return _function(value.fn)
    if hasattr(value, "__triton_builtin__"):
        return _unknown(value.__name__)
    return value


def _unknown(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{machine.where()}: the interpreter has no {name}")

    return refuse
