"""``taskx list`` and ``taskx show``."""

from __future__ import annotations

import pytest
from helpers import PATIENCE

HOSTILE = "\x1b[31mred\x07 \x9b2J \u202eevil\r\n second"


@pytest.fixture
def failed(queue):
    """A task that has failed with a hostile error."""

    @queue.executor(max_attempts=2)
    def email(to: str, password: str = "hunter2", note: str = "") -> None:
        raise ValueError(HOSTILE)

    with queue:
        handle = queue.submit(
            "email", {"to": "ann", "password": "hunter2", "note": HOSTILE}, created_by="web"
        )
        handle.exception(PATIENCE)
    return handle


def test_a_list_has_a_row_for_each_task(queue, taskx):
    queue.declare("email", "报告")
    one, two = queue.submit("email", {"to": "ann"}), queue.submit("报告", delay=3600)
    said = taskx("list")
    assert said.code == 0
    assert said.lines[0].split() == ["ID", "TYPE", "STATUS", "AGE", "TRY", "DETAIL", "PARAMS"]
    assert said.lines[1].split()[:3] == [two.id, "报告", "pending"]
    assert "due in" in said.lines[1]
    assert said.lines[2].split()[:3] == [one.id, "email", "pending"]
    assert "{'to': 'ann'}" in said.lines[2]
    assert said.err == ""


def test_a_list_leaves_out_the_tag_of_the_trace(queue, taskx):
    queue.declare("email")
    trace = f"trace:00-{'a' * 32}-{'b' * 16}-01"
    handle = queue.submit("email", tags=["eu", trace, "trace:mine"])
    said = taskx("list", f"tag:{trace}", COLUMNS="400")
    assert "  eu trace:mine  " in said.lines[1]
    assert trace not in said.out
    assert f"eu {trace} trace:mine" in taskx("show", handle.id).out
    assert taskx("list", "--json").rows[0]["tags"] == ["eu", trace, "trace:mine"]


def test_a_list_obeys_its_filter(queue, taskx):
    queue.declare("email", "sms")
    wanted = queue.submit("email", {"user": {"id": 7}})
    queue.submit("email", {"user": {"id": 8}})
    queue.submit("sms")
    rows = taskx("list", "type:email", "params.user.id:7", "--json").rows
    assert [row["id"] for row in rows] == [wanted.id]
    assert taskx("list", "type:email params.user.id:7", "--json").rows == rows


def test_the_json_of_a_list_is_a_task_a_line(queue, taskx):
    queue.declare("email")
    handle = queue.submit("email", {"to": "ann"})
    [row] = taskx("list", "--json").rows
    assert row.pop("damage") == ""
    assert row == queue.get_task_status(handle.id).to_dict()


def test_a_list_says_that_there_is_more(queue, taskx):
    queue.declare("email")
    for _ in range(5):
        queue.submit("email")
    said = taskx("list", "--limit", "2")
    assert len(said.lines) == 3
    assert said.err == "2 of 5 tasks; --limit N or --all shows more\n"
    assert len(taskx("list", "--all").lines) == 6
    assert taskx("list", "--limit", "5").err == ""
    none = taskx("list", "--limit", "0")
    assert (none.out, none.err) == ("", "0 of 5 tasks; --limit N or --all shows more\n")


def test_an_empty_list_says_so_on_stderr(queue, taskx):
    queue.declare("email")
    queue.submit("email")
    assert taskx("list", "status:failed").err == "no task matches\n"
    said = taskx("list", "type:emial")
    assert (said.code, said.out) == (0, "")
    assert said.err == "no task has type 'emial'; did you mean 'email'?\n"
    assert taskx("list", "type:emial", "--json").err == ""


def test_a_wrong_filter_is_a_wrong_call(taskx):
    said = taskx("list", "typ:email")
    assert said.code == 2
    assert said.err == "taskx: the filter has no field 'typ'; did you mean 'type'?\n"


def test_a_task_is_shown_with_its_attempts(failed, taskx):
    said = taskx("show", failed.id)
    assert said.code == 0
    assert f"id:            {failed.id}" in said.lines
    assert any(line.startswith("submitted:") and line.endswith("by web") for line in said.lines)
    assert "attempts:      2 (2 raised); at most 2 may raise" in said.lines
    assert '    "to": "ann",' in said.lines
    assert any(line.startswith("failed 20") for line in said.lines)
    assert said.out.count("raise ValueError(HOSTILE)") == 2


def test_secrets_are_not_shown(failed, taskx):
    for words in (["list"], ["show", failed.id], ["show", failed.id, "--json"], ["list", "--json"]):
        said = taskx(*words)
        assert "hunter2" not in said.out
        assert "***" in said.out


@pytest.mark.parametrize("command", ["list", "show"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_control_characters_do_not_reach_the_terminal(failed, taskx, command, form):
    said = taskx(command, *([failed.id] if command == "show" else []), *form)
    assert said.code == 0
    for character in "\x1b\x07\x9b\u202e\r":
        assert character not in said.out
    assert "evil" in said.out


def test_the_json_of_a_task_has_its_fields(failed, queue, taskx):
    [row] = taskx("show", failed.id, "--json").rows
    task = queue.get_task_status(failed.id).to_dict()
    assert row.pop("damage") == ""
    assert row.pop("params") == {**task.pop("params"), "password": "***"}
    assert row == task


def test_an_unknown_id_is_not_found(taskx):
    said = taskx("show", "nope")
    assert (said.code, said.out) == (3, "")
    assert said.err == "taskx: no task with id 'nope' in the repository\n"


def test_an_id_with_line_breaks_is_one_cell(outside, taskx):
    outside.declare("email")
    outside.submit("email", id="two\nlines \x1b[2J")
    said = taskx("list")
    assert len(said.lines) == 2
    assert said.lines[1].startswith("two\\nlines \\x1b[2J  email  pending")
    assert taskx("show", "two\nlines \x1b[2J").code == 0
