"""The errors of commands: they speak the words of a shell, and never those of Python."""

from __future__ import annotations

import re

import pytest

from taskx import Queue, SQLiteRepository
from taskx.programs.cli.app import COMMANDS

from .conftest import call

#: Calls that are wrong. The words of each stand between bars; an empty one is an empty argument.
WRONG = """
answers | status:failed
finish | one
finish | one | 1
finish | one/x | yes
finish | nobody/x | 1
list | --limit | 99999999999999999999999
list | type=email
list | created_by=ann
list | params.:1
list | older:1d until:2026-11-26
list | newer:1d since:2026-11-26
list | status:lost
show | nope
dead | status:pending
why | nope
stats | --period | soon
check | --nodes | -1
check | --nodes | =1
check | --max-failed | 99999999999999999999999
failures | --since | soon
flows | --limit | 0
top | --interval | soon
wait | nope
tail | nope
watch | worker
submit |
submit | email | []
submit | email | {"n": NaN}
submit | email | -p | x
submit | email | --id |
submit | email | --id | one
submit | email | --id | x | --depends-on | x
submit | email | --tag | two words
submit | email | --timeout | 0s
submit | email | --max-attempts | 99999999999999
submit | email | --priority | 99999999999999
submit | email | --unique-key |
submit | email | --concurrency-key |
submit | email | --run-at | 2030-01-01 | --expires | 0s
cancel | --where |
cancel | --where | status:completed
requeue | --where |
requeue | --where | status:completed
requeue | --where | type:email | --rate | 5
requeue | --where | type:email | --rate | none
requeue | --where | type:email | --rate | 0/m
requeue | one | --from-step | charge
requeue | --group | nope
delete | --where |
delete | --where | status:running
prune | --older | soon
pause |
resume |
changes | --limit | 0
nodes | stop | nope
stacks | nope
limits | nope
tune | --limit | api | --rate | 5/m | --rate | 6/m | --burst | 1
tune | --limit | tenant: | --concurrency | 101
tune | --limit | type/email | --rate | 5/m
tune | --limit | api | --workers | 2
tune | --limit | api | --max-concurrency | 3
tune | --limit | api | --scope | node
tune | email | --concurrency | 3
tune | --share | 3
tune | email | --rate | 5
tune | email | --rate | 0/m
tune | email | --rate | 5/m | --burst | 0
tune | email | --max-concurrency | 0
tune | --workers | 99999999999
tune | --rate | 5/m
hold | api | soon
hold | api | 0s
release |
schedules | show | nope
schedules | backfill | nightly | --from | 2026-01-02 | --to | 2026-01-01
schedules | backfill | nightly | --from | 0001-01-01
worker | app
worker | app:queue | --max-memory | 1
worker | app:queue | --max-age | 0s
dashboard | --host | 0.0.0.0
doctor | nope
migrate | nope
migrate | old.db | new.db | --prefix | 1
"""
CALLS = [[word.strip() for word in line.split("|")] for line in WRONG.strip().splitlines()]

#: What only Python says: calls, keyword arguments, literals, and names with an underscore.
PYTHON = re.compile(
    r"""\w\(\) | \b\w+=(?:True|False|None|[{\['"]) | \b(?:True|False|None)\b | queue\. |
    \((?:\w+,\s\w+|'',)\) | (?<![\w'"])(?!error_type\b)[a-z]+_[a-z_]+""",
    re.VERBOSE,
)


@pytest.fixture
def url(tmp_path, monkeypatch):
    """The path of a file with a pending task and a schedule."""
    # So that this limit is soon found.
    monkeypatch.setattr("taskx.queue.schedule.MOST_BACKFILLED", 3)
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    queue.submit("email", {"n": 1}, id="one")
    queue.schedule("nightly", "0 3 * * *", "email", {})
    queue.close()
    return str(tmp_path / "tasks.db")


@pytest.mark.parametrize("args", CALLS, ids=" ".join)
def test_an_error_of_a_command_has_no_words_of_python(url, args):
    where = [] if args[0] == "worker" else ["--repository", url]
    said = call(*args, *where)
    assert said.code in (2, 3, 4)
    message = said.err.splitlines()[-1]
    for word in args:  # the user's own words may be repeated
        message = message.replace(repr(word), "…")
    assert PYTHON.findall(message) == [], message


def test_each_command_has_a_wrong_call():
    assert {command.name for command in COMMANDS} == {args[0] for args in CALLS}


@pytest.mark.parametrize("path", ["missing.db", "empty.db", "other.db"])
def test_an_error_of_the_repository_has_no_words_of_python(tmp_path, path):
    (tmp_path / "empty.db").touch()
    (tmp_path / "other.db").write_text("no database, but long enough to look at")
    said = call("list", "--repository", str(tmp_path / path))
    message = said.err.replace(str(tmp_path), "…")  # the name of a new folder has random letters
    assert said.code == 5
    assert PYTHON.findall(message) == [], message


@pytest.mark.parametrize("option", ["--repository", "--app"])
@pytest.mark.parametrize("before", [True, False])
def test_an_empty_option_does_not_mean_the_repository_of_the_variable(url, option, before):
    words = ["delete", "--where", "type:email", "--yes"]
    words = [option, "", *words] if before else [*words, option, ""]
    said = call(*words, TASKX_REPOSITORY=url)
    assert said.code == 2
    assert f"Invalid value for '{option}': it is empty" in said.err
    assert call("show", "one", "--repository", url).code == 0


def test_an_empty_variable_is_one_that_is_not_set():
    said = call("list", TASKX_REPOSITORY="")
    assert (said.code, "which repository?" in said.err) == (2, True)


def test_an_error_names_the_option_as_it_is_typed(url):
    said = call("tune", "email", "--max-concurrency", "0", "--repository", url)
    assert said.err.startswith("taskx: --max-concurrency must be a whole number")
    said = call("submit", "email", "--by", "x" * 300, "--repository", url)
    assert said.err.splitlines()[-1].startswith("taskx: --by has 300 characters")
