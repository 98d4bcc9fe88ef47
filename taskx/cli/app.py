"""The public name of the groups of commands."""

from taskx.programs.cli.app import make_group as make_group
