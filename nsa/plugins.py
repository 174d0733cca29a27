"""How a user names what plugs in: φ, importance rule, optimizer, schedule and layer kind alike.

    mean_pool                                     a built-in, by its name
    {name: compress_transformer, num_layers: 2}   a built-in with options
    {_target_: my_package.MyPool, width: 3}       one's own, by its dotted path, as Hydra has it

In Python, the class or function itself will do as well. `find` resolves all of them to a callable
whose options are bound; `ask` calls it with what its caller knows and its signature asks for.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

Spec = str | Mapping[str, Any] | Callable[..., Any]


def find(option: str, spec: Spec, builtins: Mapping[str, Callable[..., Any]]) -> partial[Any]:
    """What `spec` names, with its options bound; `option` is what errors call it.

    Raises:
        ValueError: for an unknown name, a path that cannot be imported, and an option that the
            callable does not take.
    """
    if callable(spec):
        return partial(spec)
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name: Any = given.pop("name", None)
    path: Any = given.pop("_target_", None)
    if (name is None) == (path is None):
        raise ValueError(
            f"{option}={spec} must have one of name (a built-in: {', '.join(builtins)}) and "
            "_target_ (the dotted path of your own)"
        )
    if path is not None:
        found = _imported(option, path)
    elif name in builtins:
        found = builtins[name]
    else:
        raise ValueError(
            f"{option}={name!r} is unknown: choose one of {', '.join(builtins)}, or name your own "
            "by _target_"
        )
    _check_options(option, path or name, found, given)
    return partial(found, **given)


def ask(factory: partial[Any], **known: Any) -> Any:
    """Call `factory` with those of `known` that it has a parameter for and that are not bound yet.

    Raises ValueError where a parameter without a default is neither bound nor known.
    """
    parameters = _parameters(factory.func)  # what it names, bound or not
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is Parameter.empty
        and parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        and not (name in known or name in factory.keywords)
    ]
    if missing:
        raise ValueError(
            f"{label(factory)} needs {', '.join(missing)}: set it beside its name; what it is "
            f"given by itself is {', '.join(known)}"
        )
    free = {name: known[name] for name in known if name not in factory.keywords}
    return factory(**{name: value for name, value in free.items() if name in parameters})


def label(thing: Any) -> str:
    """The dotted path of a class or function, whatever options are bound to it."""
    while isinstance(thing, partial):
        thing = thing.func
    return f"{thing.__module__}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _imported(option: str, path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{option}: _target_={path} cannot be imported ({error}): it must be the dotted path "
            "of a class or function that Python finds from where you started it"
        ) from error
    if not callable(found):
        raise ValueError(f"{option}: _target_={path} is {found!r}: it must be a class or function")
    return found


def _check_options(
    option: str, name: str, found: Callable[..., Any], given: Mapping[str, Any]
) -> None:
    parameters = _parameters(found)
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [key for key in given if key not in parameters]
    if unknown:
        raise ValueError(
            f"{option}: {name} takes no {', '.join(unknown)}; it takes {', '.join(parameters)}"
        )


def _parameters(factory: Callable[..., Any]) -> Mapping[str, Parameter]:
    return signature(factory).parameters
