"""``taskx changes``."""

from __future__ import annotations


def test_changes_are_listed_newest_first_with_who_made_them(outside, taskx):
    outside.declare("email")
    task = outside.submit("email", {})
    taskx("pause", "email")
    taskx("cancel", task.id)
    said = taskx("changes")
    assert said.code == 0
    head, newest, oldest = said.lines
    assert head.split() == ["AT", "BY", "ACTION", "TARGET"]
    assert newest.split()[2:] == ["cancel", task.id]
    assert oldest.split()[2:] == ["pause", "email"]
    [row] = taskx("changes", "--limit", "1", "--json").rows
    assert (row["action"], row["target"], row["detail"]) == ("cancel", task.id, None)
    assert row["by"] == newest.split()[1]


def test_secrets_in_the_details_of_a_change_are_not_printed(outside, taskx):
    outside.note_change("ann", "edit", "shop", {"password": "geheim", "n": 1})
    said = taskx("changes")
    assert "geheim" not in said.out
    assert "'n': 1" in said.out
    [row] = taskx("changes", "--json").rows
    assert row["detail"] == {"password": "***", "n": 1}


def test_secrets_in_the_filter_of_a_change_are_not_noted(outside, taskx):
    taskx("cancel", "--where", "params.n:1 params.user.password:geheim type:email", "--yes")
    [change] = outside.changes()
    assert change.target == "type:email params.n:1 params.user.password:***"


def test_no_change_is_noted(taskx):
    said = taskx("changes")
    assert (said.code, said.out, said.err) == (0, "", "no change is noted\n")
