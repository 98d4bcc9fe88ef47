"""JSON forms of values, and the errors of values that do not fit them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from taskx.tasks.errors import PayloadError
from taskx.tasks.redact import is_secret


class Misfit(Exception):
    """A value does not fit its annotation.

    Attributes:
        problem: what is wrong with the value, as text.
        path: the place of the value inside the value that is coded.
        quiet: the problem without the value itself, for a value that is secret.
    """

    def __init__(self, problem: str, path: str = "", quiet: str = "") -> None:
        super().__init__(problem, path)
        self.problem = problem
        self.path = path
        self.quiet = quiet or problem

    def under(self, key: str, *, secret: bool = False) -> Misfit:
        """Return the error as one of the value that has this one at ``key``."""
        misfit = Misfit(self.quiet if secret else self.problem, f"{key}{self.path}", self.quiet)
        # The cause may have the value in its text.
        misfit.__cause__ = None if secret else self.__cause__
        return misfit


class Form(ABC):
    """The JSON form of an annotation's values."""

    def coded(self, value: Any, back: bool) -> Any:
        """Return the JSON of a value; with ``back`` the value of a JSON value.

        What is encoded or decoded already is returned as it is.

        Raises:
            Misfit: the value does not fit the annotation.
        """
        return None if value is None else self._coded(value, back)

    @abstractmethod
    def _coded(self, value: Any, back: bool) -> Any: ...


def coded_list(values: Sequence[Any], forms: Iterable[Form | None], back: bool) -> list[Any]:
    made: list[Any] = []
    try:
        for value, form in zip(values, forms, strict=False):  # the forms may have no end
            made.append(value if form is None else form.coded(value, back))
    except Misfit as misfit:
        inner = misfit.under(f"[{len(made)}]")
        raise inner from inner.__cause__
    return made


def coded_items(values: Mapping[Any, Any], forms: Mapping[Any, Form | None], back: bool) -> Any:
    made: dict[Any, Any] = {}
    for key, value in values.items():
        form = forms[key]
        try:
            made[key] = value if form is None else form.coded(value, back)
        except Misfit as misfit:
            inner = misfit.under(f".{key}", secret=is_secret(str(key)))
            raise inner from inner.__cause__
    return made


def guarded(what: str, code: Callable[[], Any]) -> Any:
    """Return the result of ``code``; raise ``PayloadError`` if a value does not fit."""
    try:
        return code()
    except Misfit as misfit:
        path = (what + misfit.path)[:500]
        raise PayloadError(path, misfit.problem) from misfit.__cause__
    except RecursionError:
        raise PayloadError(what, "is nested too deep, or contains itself") from None
