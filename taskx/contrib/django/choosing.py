"""The backend that a call of ``manage.py taskx`` is about: its option ``--backend``."""

from __future__ import annotations

import click

from taskx.contrib.django.settings import DEFAULT, entries

_CHOSEN = "taskx.django.backend"


def where() -> list[click.Parameter]:
    """Return the option of every command that chooses the backend."""
    return [
        click.Option(
            ["--backend"],
            metavar="ALIAS",
            help="The alias in TASKS. [default: default]",
            expose_value=False,
            is_eager=True,
            callback=_choose,
            shell_complete=_complete,
        )
    ]


def chosen() -> str:
    """Return the alias that this call is about."""
    alias: str = click.get_current_context().meta.get(_CHOSEN, DEFAULT)
    return alias


def _choose(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        ctx.meta[_CHOSEN] = value
    return value


def _complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    return [alias for alias in entries() if alias.startswith(begun)]
