"""The params and the result of an executor as JSON, by their annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from taskx.tasks.forms import coded_items, guarded
from taskx.tasks.model import Task


class Values:
    """The forms of the params and the result of an executor.

    An annotation that cannot be resolved when the executor is made is tried again when the first value is
    coded: it may name a class that the module defines later.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Sequence[inspect.Parameter]
    ) -> None:
        self._function = function
        self._parameters = parameters
        self._read()

    def _read(self) -> None:
        from taskx.tasks.annotations import (
            Reader,  # many modules, which other executors do not need
        )

        reader, names = Reader(), _names(self._function)
        forms = {p.name: reader.read(p.annotation, names) for p in self._parameters}
        rest = [p.name for p in self._parameters if p.kind is p.VAR_KEYWORD]
        self._rest = forms.pop(rest[0]) if rest else None
        self._forms = forms
        self._result = reader.read(_returned(self._function), names)
        self._late = reader.failed

    def __bool__(self) -> bool:
        """Return True if there is a form at all."""
        return any((*self._forms.values(), self._rest, self._result))

    def encode_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return params as JSON values; raise ``PayloadError`` if one does not fit its annotation.

        Values without a form are returned as they are, also if they are not JSON.
        """
        return self._coded_params(params, back=False)

    def decode_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of stored params; raise ``PayloadError`` if one does not fit."""
        return self._coded_params(params, back=True)

    def encode_result(self, value: Any) -> Any:
        """Return a result as JSON; raise ``PayloadError`` if it does not fit the annotation."""
        return self._coded_result(value, back=False)

    def decode_result(self, value: Any) -> Any:
        """Return the value of a stored result; raise ``PayloadError`` if it does not fit."""
        return self._coded_result(value, back=True)

    def _coded_params(self, params: Mapping[str, Any], *, back: bool) -> dict[str, Any]:
        self._read_again()
        forms = {name: self._forms.get(name, self._rest) for name in params}
        made: dict[str, Any] = guarded("params", lambda: coded_items(params, forms, back))
        return made

    def _coded_result(self, value: Any, *, back: bool) -> Any:
        self._read_again()
        form = self._result
        return value if form is None else guarded("result", lambda: form.coded(value, back))

    def _read_again(self) -> None:
        if self._late:
            self._read()
            self._late = False


class ItemValues(Values):
    """The forms of an executor that takes a list of the params of tasks, and returns a list of results.

    The params of a task have the form of an item of the first list as a whole.
    """

    def _read(self) -> None:
        from taskx.tasks.annotations import ItemReader

        reader, names = ItemReader(), _names(self._function)
        (parameter,) = self._parameters
        self._item = reader.read_item(parameter.annotation, names)
        self._result = reader.read_item(_returned(self._function), names)
        self._late = reader.failed

    def __bool__(self) -> bool:
        return bool(self._item or self._result)

    def _coded_params(self, params: Any, *, back: bool) -> Any:
        self._read_again()
        form = self._item
        return params if form is None else guarded("params", lambda: form.coded(params, back))


def _names(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the global names of the code of a function, a partial, or a callable object."""
    code: Any = inspect.unwrap(function)
    while isinstance(code, partial):
        code = inspect.unwrap(code.func)
    if not hasattr(code, "__globals__"):
        code = inspect.unwrap(type(code).__call__)
    return getattr(code, "__globals__", {})


def _returned(function: Callable[..., Any]) -> Any:
    try:
        return inspect.signature(function).return_annotation
    except (TypeError, ValueError):  # such as a function written in C
        return inspect.Signature.empty


def values_of(
    function: Callable[..., Any],
    parameters: Sequence[inspect.Parameter] = (),
    kind: type[Values] = Values,
) -> Values | None:
    """Return the forms of a function's params and result; None if no annotation has a form."""
    annotations = [*(parameter.annotation for parameter in parameters), _returned(function)]
    if all(annotation is inspect.Parameter.empty for annotation in annotations):
        return None
    return kind(function, parameters) or None


def encoded(task: Task, values: Mapping[str, Values]) -> Task:
    """Return the task with params as JSON, if its executor is registered here and annotates some.

    Raises:
        PayloadError: a param does not fit its annotation.
    """
    known = values.get(task.type) if isinstance(task.type, str) else None
    if known is None or not isinstance(task.params, Mapping):
        return task
    return attrs.evolve(task, params=known.encode_params(task.params))
