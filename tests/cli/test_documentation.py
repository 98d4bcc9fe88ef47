"""The help and the documentation say what the command line can do."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from taskx.insight.query import FIELDS, parse_query
from taskx.programs.cli.app import COMMANDS, make_group
from taskx.programs.cli.following import WATCHABLE

from .conftest import call

PAGE = (Path(__file__).parent.parent.parent / "docs" / "command-line.rst").read_text(
    encoding="utf-8"
)
NAMES = [command.name for command in COMMANDS]

each_command = pytest.mark.parametrize("command", COMMANDS, ids=NAMES)


def test_the_page_lists_all_commands():
    table = PAGE.partition(".. table:: Commands")[2].partition("Filters\n")[0]
    assert set(re.findall(r"^   ``(\w+)``  ", table, re.MULTILINE)) == {*NAMES}


def test_the_page_and_the_help_name_all_fields_of_a_filter():
    table = PAGE.partition("Term  ")[2].partition("A part in double")[0]
    named = {
        name.split(".")[0].rstrip(".") for name in re.findall(r"^``(\w+)[:.]", table, re.MULTILINE)
    }
    assert named == {field.rstrip(".") for field in FIELDS}
    help = call("list", "--help").out
    assert all(re.search(rf"\b{field.rstrip('.')}\b", help) for field in FIELDS)


def test_the_terms_of_the_page_are_valid():
    terms = re.findall(r"^``(\w\S+:\S+)``  ", PAGE, re.MULTILINE)
    assert len(terms) > 8
    for term in terms:
        parse_query(term.replace("TIME", "2026-11-26"))


@each_command
def test_the_help_of_a_command_says_what_it_does_and_then_has_examples(command):
    said = call(command.name, "--help")
    assert said.code == 0
    assert command.get_short_help_str(200)
    assert not said.lines[2].strip().startswith("$ taskx ")
    assert said.out.index("\n  $ taskx ") < said.out.index("Options:")
    assert "--repository" in said.out or command.name == "worker"


@each_command
def test_the_examples_in_the_help_are_valid_calls(command):
    examples = re.findall(r"^ +\$ taskx (\w+)(.*)$", command.help, re.MULTILINE)
    assert examples
    assert {name for name, _ in examples} == {command.name}
    for _, words in examples:
        known = {
            name
            for param in command.get_params(_context(command))
            for name in (*param.opts, *param.secondary_opts)
        }
        known |= _of_actions(command)
        before_pipe = re.split(r" [|&] ?", words)[0]
        used = set(re.findall(r"(?<![\w'])(--?[a-z][\w-]*)", before_pipe))
        assert used <= known | {"-"}, words


def _of_actions(command: click.Command) -> set[str]:
    actions = getattr(command, "commands", {}).values()
    return {name for action in actions for param in action.params for name in param.opts}


def _context(command: click.Command) -> click.Context:
    return click.Context(command, parent=click.Context(make_group()))


def test_the_help_of_the_group_names_all_commands():
    said = call("--help")
    assert [name for name in NAMES if f"\n  {name} " not in said.out] == []
    assert "Exit codes:" in said.out
    assert "\nMore:\n" not in said.out, "each command is in a section"
    assert said.out.index("See and steer") < said.out.index("$ taskx") < said.out.index("Look at")


def test_what_can_be_watched_exists():
    assert {*WATCHABLE} <= {*NAMES}


def test_a_mounted_group_has_no_options_for_the_repository(outside):
    assert "\n  --repository" not in call("--help", queue=outside).out
    assert "\n  --repository" not in call("list", "--help", queue=outside).out
    said = call("list", "--repository", "sqlite:///x.db", queue=outside)
    assert said.code == 2


def test_a_group_can_be_mounted_with_a_function_that_returns_its_queue(outside):
    @click.group()
    def shop() -> None: ...

    shop.add_command(make_group(lambda: outside))
    outside.declare("email")
    outside.submit("email", id="one")
    from click.testing import CliRunner

    result = CliRunner().invoke(shop, ["taskx", "list", "--json"])
    assert (result.exit_code, result.stdout.count('"id": "one"')) == (0, 1)
    result = CliRunner().invoke(shop, ["taskx", "show", "nope"])
    assert (result.exit_code, result.stderr) == (
        3,
        "taskx: no task with id 'nope' in the repository\n",
    )
