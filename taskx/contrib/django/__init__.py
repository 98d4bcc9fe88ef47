"""TaskX in Django: tasks in the site's database. It needs Django: ``pip install 'taskx-queue[django]'``.

The names are imported at their first use, because models need settings. Add ``"taskx.contrib.django"`` to
``INSTALLED_APPS`` and run ``manage.py migrate`` to make the tables.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskx.contrib.django.repository import DjangoRepository as DjangoRepository

# The module of each public name.
_MODULES: dict[str, str] = {"DjangoRepository": "repository"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
