"""Schedules in the admin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from django.contrib import admin

from taskx.contrib.django.admin.forms import ScheduleForm
from taskx.contrib.django.admin.pages import QueueAdmin, note, queue_of_site
from taskx.queue.queue import Queue


class ScheduleAdmin(QueueAdmin):
    """Schedules: a list, a form for each, and actions."""

    form = ScheduleForm
    list_display = ("__str__", "spec", "tz", "type", "next_tick", "last_tick", "overlap", "ticks")
    search_fields = ("name",)
    sortable_by = ()
    actions = ("pause", "resume", "run_now")
    fieldsets = (
        (None, {"fields": ("name", "spec", "tz", "paused")}),
        ("Its tasks", {"fields": ("type", "params", "priority", "tags", "expires")}),
        ("Late and busy", {"fields": ("misfire", "misfire_grace", "overlap")}),
    )

    # --- the list

    def get_changelist_instance(self, request: Any) -> Any:
        """Return the list, whose rows have their schedules."""
        changelist = super().get_changelist_instance(request)
        queue = queue_of_site()
        known = {} if queue is None else queue.schedules()
        for row in changelist.result_list:
            row.read = known.get(str(row))
        return changelist

    @admin.display(description="times", empty_value="damaged")
    def spec(self, row: Any) -> str | None:
        """Return the cron expression or interval."""
        return None if row.read is None else str(row.read.spec)

    @admin.display(description="time zone")
    def tz(self, row: Any) -> str:
        """Return the time zone."""
        return "" if row.read is None else row.read.tz

    @admin.display(description="type")
    def type(self, row: Any) -> str:
        """Return the type of its tasks."""
        return "" if row.read is None else row.read.type

    @admin.display(description="next tick")
    def next_tick(self, row: Any) -> datetime | None:
        """Return the next tick."""
        return None if row.read is None else row.read.next_tick

    @admin.display(description="last tick")
    def last_tick(self, row: Any) -> datetime | None:
        """Return the last tick that got a task."""
        return None if row.read is None else row.read.last_tick

    @admin.display(description="overlap")
    def overlap(self, row: Any) -> str:
        """Return what happens to a tick while an earlier task has not ended."""
        return "" if row.read is None else row.read.overlap

    @admin.display(description="ticks", boolean=True)
    def ticks(self, row: Any) -> bool:
        """Return False for a schedule that is paused."""
        return row.read is not None and not row.read.paused

    # --- the form

    def has_add_permission(self, request: Any) -> bool:
        """Return True if the user may add schedules, and there is a queue for them."""
        return bool(super().has_add_permission(request)) and queue_of_site() is not None

    def get_object(self, request: Any, object_id: str, from_field: str | None = None) -> Any:
        """Return the row of a schedule with the schedule itself; None if it is gone or damaged."""
        row = super().get_object(request, object_id, from_field)
        queue = queue_of_site()
        if row is None or queue is None:
            return None
        row.read = queue.schedules().get(str(row))
        return None if row.read is None else row

    def get_form(self, request: Any, obj: Any = None, change: bool = False, **options: Any) -> Any:
        """Return the form, with the queue and the schedule that is edited."""
        made = super().get_form(request, obj, change=change, **options)
        return type(made)(
            made.__name__,
            (made,),
            {"queue": queue_of_site(), "schedule": None if obj is None else obj.read},
        )

    def save_model(self, request: Any, obj: Any, form: Any, change: bool) -> None:
        """Note who has declared the schedule; the form has stored it."""
        queue = queue_of_site()
        assert queue is not None
        note(request, queue, "edit schedule" if change else "add schedule", [str(obj)])

    # --- actions

    @admin.action(description="Pause selected schedules", permissions=["steer"])
    def pause(self, request: Any, rows: Any) -> None:
        """Pause schedules."""
        self._each(request, rows, "pause schedule", "paused", lambda schedule: schedule.pause())

    @admin.action(description="Resume selected schedules", permissions=["steer"])
    def resume(self, request: Any, rows: Any) -> None:
        """Resume schedules."""
        self._each(request, rows, "resume schedule", "resumed", lambda schedule: schedule.resume())

    @admin.action(description="Run selected schedules now", permissions=["steer"])
    def run_now(self, request: Any, rows: Any) -> None:
        """Submit a task of each schedule."""
        self._each(request, rows, "trigger schedule", "run now", lambda one: one.trigger())

    def _each(
        self, request: Any, rows: Any, name: str, done: str, change: Callable[[Any], object]
    ) -> None:
        names = [str(row) for row in rows]

        def changed(queue: Queue) -> str:
            known = queue.schedules()
            wanted = [known[one] for one in names if one in known]
            for schedule in wanted:
                change(schedule)
            return f"{len(wanted)} schedules: {done}."

        self.act(request, name, names, changed)

    # --- deleting

    def get_deleted_objects(
        self, objs: Any, request: Any
    ) -> tuple[list[str], dict[str, int], set[str], list[str]]:
        """Return what a delete would remove; the tasks that schedules have made stay."""
        names = [str(row) for row in objs]
        needed = set() if self.has_delete_permission(request) else {self.opts.verbose_name}
        return names, {self.opts.verbose_name_plural: len(names)}, needed, []

    def delete_model(self, request: Any, obj: Any) -> None:
        """Remove a schedule."""
        self._remove(request, [str(obj)])

    def delete_queryset(self, request: Any, queryset: Any) -> None:
        """Remove schedules."""
        self._remove(request, [str(row) for row in queryset])

    def _remove(self, request: Any, names: Sequence[str]) -> None:
        queue = queue_of_site()
        assert queue is not None
        known = queue.schedules()
        for name in names:
            if name in known:
                known[name].remove()
        note(request, queue, "remove schedule", names)
