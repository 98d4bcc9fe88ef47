"""Tasks and dead letters in the admin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import NoReverseMatch, path, reverse
from django.utils.html import format_html_join

from taskx.contrib.django.admin import bulk
from taskx.contrib.django.admin.finding import (
    MOST,
    AtMost,
    QueueName,
    Status,
    Submitted,
    Tag,
    Type,
    search,
)
from taskx.contrib.django.admin.forms import AnswerForm, RequeueForm
from taskx.contrib.django.admin.pages import QueueAdmin, note, queue_of_site
from taskx.contrib.django.admin.values import (
    NOTHING,
    as_json,
    as_table,
    as_text,
    last_lines,
    value,
)
from taskx.queue.queue import Queue
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import TaskNotFound
from taskx.tasks.lifecycle import ANSWER
from taskx.tasks.model import Task, TaskStatus
from taskx.tasks.redact import redacted


class TaskAdmin(QueueAdmin):
    """Tasks: a list, a page for each, and actions."""

    paginator = AtMost
    show_full_result_count = False
    ordering = ("-created_at", "-seq")
    sortable_by = ()
    list_display: tuple[str, ...] = (
        *("task_id", "type", "status", "submitted", "ended", "percent", "error_type", "created_by"),
    )
    list_filter: tuple[Any, ...] = (Status, Submitted, QueueName, Type, Tag)
    search_fields = ("task_id",)  # for the search box: see get_search_results
    search_help_text = (
        "The id or its beginning, a unique key; of the newest 100,000 tasks also a concurrency key, or a "
        "text in the error or the params."
    )
    change_form_template = "admin/taskx/task/change_form.html"
    actions: tuple[str, ...] = ("answer", "cancel", "requeue", "requeue_edited")
    fieldsets = (
        (None, {"fields": ("task_id", "task_type", "task_status", "why", "task_progress")}),
        ("Input and result", {"fields": ("task_params", "task_result", "task_checkpoints")}),
        ("Failure", {"fields": ("task_error", "task_traceback")}),
        ("Times", {"fields": ("created", "due", "started", "completed", "took", "expiring")}),
        ("Attempts", {"fields": ("task_attempts", "task_worker")}),
        ("Log", {"fields": ("task_log",)}),
        (
            "Options",
            {
                "fields": (
                    *("task_created_by", "task_priority", "task_tags", "task_flow", "parents"),
                    *("keys", "task_timeout", "task_max_attempts", "task_max_crashes"),
                )
            },
        ),
    )

    task_type = value("task_type", "type", lambda task: task.type)
    task_status = value("task_status", "status", lambda task: task.status.value)
    task_progress = value(
        "task_progress", "progress", lambda task: f"{task.progress} % {task.message}"
    )
    task_result = value(
        "task_result",
        "result",
        lambda task: as_json(task.result) if task.status is TaskStatus.COMPLETED else None,
    )
    task_error = value("task_error", "error", lambda task: as_text(task.error))
    task_traceback = value("task_traceback", "traceback", lambda task: as_text(task.traceback))
    created = value("created", "submitted at", lambda task: task.created_at)
    due = value("due", "not before", lambda task: task.run_at)
    started = value("started", "started at", lambda task: task.started_at)
    completed = value("completed", "ended at", lambda task: task.completed_at)
    took = value("took", "took seconds", lambda task: round(task.duration, 3))
    expiring = value("expiring", "expires at", lambda task: task.expires_at)
    task_attempts = value("task_attempts", "attempts", lambda task: as_table(task.attempts))
    task_worker = value("task_worker", "worker", lambda task: task.worker)
    task_log = value("task_log", "log", lambda task: last_lines(task.log))
    task_created_by = value("task_created_by", "created by", lambda task: task.created_by)
    task_priority = value("task_priority", "priority", lambda task: task.priority)
    task_tags = value("task_tags", "tags", lambda task: ", ".join(task.tags))
    task_flow = value("task_flow", "flow", lambda task: task.flow)
    parents = value("parents", "depends on", lambda task: ", ".join(task.depends_on))
    keys = value(
        "keys",
        "unique and concurrency key",
        lambda task: ", ".join(key for key in (task.unique_key, task.concurrency_key) if key),
    )
    task_timeout = value("task_timeout", "timeout in seconds", lambda task: task.timeout)
    task_max_attempts = value("task_max_attempts", "most attempts", lambda task: task.max_attempts)
    task_max_crashes = value("task_max_crashes", "most crashes", lambda task: task.max_crashes)

    # --- who may do what

    def has_add_permission(self, request: Any) -> bool:
        """Return False: programs submit tasks."""
        return False

    def has_view_permission(self, request: Any, obj: Any = None) -> bool:
        """Return True if the user may view tasks, change them, or answer."""
        return any(self.may(request, action) for action in ("view", "change", "answer"))

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: tasks are changed by actions only."""
        return False

    # --- the list

    def get_queryset(self, request: Any) -> Any:
        """Return the rows without their long texts, which a list does not show."""
        return super().get_queryset(request).only(*_LISTED)

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Return the tasks that the search finds."""
        queue = queue_of_site()
        redact = () if queue is None else queue.config.redact
        return search(queryset, search_term, redact), False

    @admin.display(description="submitted at")
    def submitted(self, row: Any) -> datetime | None:
        """Return the time of the submit."""
        return _moment(row.created_at)

    @admin.display(description="ended at")
    def ended(self, row: Any) -> datetime | None:
        """Return the time of the end."""
        return _moment(row.completed_at)

    @admin.display(description="progress")
    def percent(self, row: Any) -> str:
        """Return the progress."""
        return f"{row.progress} %"

    # --- the page of a task

    def get_readonly_fields(self, request: Any, obj: Any = None) -> list[str]:
        """Return all fields."""
        return [name for _, options in self.fieldsets for name in options["fields"]]

    def get_object(self, request: Any, object_id: str, from_field: str | None = None) -> Any:
        """Return the row of a task with the task itself, as the queue reads it; None if it is gone."""
        row = super().get_object(request, object_id, from_field)
        queue = queue_of_site()
        if row is None or queue is None:
            return None
        try:
            row.read = queue.get_task_status(row.task_id)
        except TaskNotFound:
            return None
        row.queue = queue
        return row

    @admin.display(description="why")
    def why(self, row: Any) -> Any:
        """Return why the task waits, runs or has ended."""
        return format_html_join(
            "", "{}<br>", ((str(reason),) for reason in row.queue.why(row.task_id))
        )

    @admin.display(description="params")
    def task_params(self, row: Any) -> Any:
        """Return the params without secrets."""
        return as_json(redacted(row.read.params, row.queue.config.redact))

    @admin.display(description="checkpoints")
    def task_checkpoints(self, row: Any) -> Any:
        """Return the results of the steps without secrets."""
        kept = row.read.checkpoints
        return as_json(redacted(kept, row.queue.config.redact)) if kept else NOTHING

    def render_change_form(self, request: Any, context: Any, *args: Any, **options: Any) -> Any:
        """Show a task, with the actions that are possible."""
        task = options["obj"].read
        may = self.has_steer_permission(request)
        context.update(
            title=f"Task {task.id}",
            may_answer=_is_open(task) and self.may(request, "answer"),
            may_cancel=may and not task.status.finished,
            may_requeue=may and task.status.value in ("failed", "cancelled"),
            dashboard=_dashboard(task.id),
        )
        return super().render_change_form(request, context, *args, **options)

    def own_urls(self) -> list[Any]:
        """Return the URLs of the pages that cancel, requeue and answer."""
        name = f"{self.opts.app_label}_{self.opts.model_name}"
        return [
            path(
                f"<path:object_id>/{action}/",
                self.admin_site.admin_view(view),
                name=f"{name}_{action}",
            )
            for action, view in (
                ("cancel", self.cancel_view),
                ("requeue", self.requeue_view),
                ("answer", self.answer_view),
            )
        ]

    def cancel_view(self, request: Any, object_id: str) -> Any:
        """Ask if a task shall be cancelled, or cancel it."""
        row = self._row_to_steer(request, object_id)
        if row is None:
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)
        if request.method == "POST":
            self.act(request, "cancel", [row.task_id], lambda queue: _cancelled(queue, row.task_id))
            return redirect(self._page("change", row.pk))
        return self._ask(request, row, f"Cancel task {row.task_id}?", None, "Cancel the task")

    def requeue_view(self, request: Any, object_id: str) -> Any:
        """Show the form to run a task again, or run it again."""
        row = self._row_to_steer(request, object_id)
        if row is None:
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)
        sent = request.POST if request.method == "POST" else None
        form = RequeueForm(row.queue, row.read, sent)
        if sent is not None and form.is_valid():
            self.message_user(request, "The task runs again.", messages.SUCCESS)
            note(request, row.queue, "requeue", [row.task_id])
            return redirect(self._page("change", row.pk))
        return self._ask(request, row, f"Run task {row.task_id} again", form, "Run again")

    def answer_view(self, request: Any, object_id: str) -> Any:
        """Show the form to give an answer, or give it."""
        if not self.may(request, "answer"):
            raise PermissionDenied
        row = self.get_object(request, unquote(object_id))
        if row is None or not _is_open(row.read):
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)
        sent = request.POST if request.method == "POST" else None
        form = AnswerForm(row.queue, row.read, request.user.get_username(), sent)
        if sent is not None and form.is_valid():
            self.message_user(request, "The answer was given.", messages.SUCCESS)
            return redirect(self._page("change", row.pk))
        return self._ask(
            request, row, f"Answer {row.task_id}", form, "Answer", shown=self.task_params(row)
        )

    def _row_to_steer(self, request: Any, object_id: str) -> Any:
        if not self.has_steer_permission(request):
            raise PermissionDenied
        return self.get_object(request, unquote(object_id))

    def _page(self, name: str, *args: Any) -> str:
        view = f"{self.admin_site.name}:{self.opts.app_label}_{self.opts.model_name}_{name}"
        url: str = reverse(view, args=args)
        return url

    def _ask(
        self, request: Any, row: Any, title: str, form: Any, button: str, shown: Any = None
    ) -> Any:
        context = {
            **self.admin_site.each_context(request),
            "title": title,
            "opts": self.opts,
            "original": row,
            "form": form,
            "button": button,
            "shown": shown,
            "back": self._page("change", row.pk),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/taskx/task/ask.html", context)

    # --- actions

    @admin.action(description="Give the selected answer", permissions=["answer"])
    def answer(self, request: Any, rows: Any) -> Any:
        """Go to the page that gives an answer for which a task waits."""
        found = [*rows.values_list("pk", "type", "status")[:2]]
        if [rest for _, *rest in found] != [[ANSWER, TaskStatus.PENDING.value]]:
            text = "Select one pending task of the type answer."
            self.message_user(request, text, messages.ERROR)
            return None
        return redirect(self._page("answer", found[0][0]))

    def has_answer_permission(self, request: Any) -> bool:
        """Return True if the user may give answers."""
        return self.may(request, "answer")

    @admin.action(description="Cancel selected tasks", permissions=["steer"])
    def cancel(self, request: Any, rows: Any) -> None:
        """Cancel tasks."""
        self._act_on_all(
            request,
            "cancel",
            rows,
            lambda queue: queue.cancel_many,
            "{} of {} tasks are cancelled. Running ones are asked to stop; ended ones stay as they are.",
        )

    @admin.action(description="Run selected tasks again", permissions=["steer"])
    def requeue(self, request: Any, rows: Any) -> None:
        """Requeue tasks."""
        self._act_on_all(
            request,
            "requeue",
            rows,
            lambda queue: queue.requeue_many,
            "Tasks that run again, with those that had ended because of them: {}. Only failed and "
            "cancelled tasks do.",
        )

    def _act_on_all(
        self,
        request: Any,
        name: str,
        rows: Any,
        method: Callable[[Queue], bulk.Change],
        sentence: str,
    ) -> None:
        """Change tasks: within the request if they are few, else after it."""
        found = bulk.pages(rows)
        ids, queue = next(found, []), queue_of_site()
        if queue is None or not next(found, []):
            self.act(
                request, name, ids, lambda queue: sentence.format(method(queue)(ids), len(ids))
            )
            return
        number = bulk.how_many(rows)
        bulk.begin(queue, name, rows, method(queue), request.user.get_username())
        self.message_user(
            request,
            f"The action goes on in the background, for all tasks that match ({number} now), the newest "
            "first. The log of changes has an entry at its end. If there is none, the process has ended "
            "before: take the action again to go on.",
            messages.SUCCESS,
        )

    @admin.action(
        description="Run the selected task again with other params", permissions=["steer"]
    )
    def requeue_edited(self, request: Any, rows: Any) -> Any:
        """Go to the page that requeues a task with other params."""
        keys = [*rows.values_list("pk", flat=True)[:2]]
        if len(keys) != 1:
            self.message_user(request, "Select one task.", messages.ERROR)
            return None
        return redirect(self._page("requeue", keys[0]))

    # --- deleting

    def get_deleted_objects(
        self, objs: Any, request: Any
    ) -> tuple[list[str], dict[str, int], set[str], list[str]]:
        """Return what a delete would remove; running tasks forbid it."""
        rows = [*objs[:MOST]]
        running = [str(row) for row in rows if row.status == "running" or row.stuck_on]
        needed = set() if self.may(request, "delete") else {self.opts.verbose_name}
        texts = [f"{row}: {row.status}" for row in rows]
        return texts, {self.opts.verbose_name_plural: len(rows)}, needed, running

    def delete_model(self, request: Any, obj: Any) -> None:
        """Delete a task."""
        self._delete(request, [obj.task_id])

    def delete_queryset(self, request: Any, queryset: Any) -> None:
        """Delete tasks, within the request: its page says that all are deleted."""
        self._delete(request, [task_id for ids in bulk.pages(queryset) for task_id in ids])

    def _delete(self, request: Any, ids: Sequence[str]) -> None:
        queue = queue_of_site()
        assert queue is not None
        left = len(ids) - queue.delete_many(ids)
        if left:
            text = f"{left} of the tasks were not deleted: since the question they started, or are gone."
            self.message_user(request, text, messages.WARNING)
        note(request, queue, "delete", ids)


# The columns of the list, and those that a delete looks at.
_LISTED = (
    *("seq", "task_id", "type", "status", "created_at", "completed_at"),
    *("progress", "error_type", "created_by", "stuck_on"),
)


def _is_open(task: Task) -> bool:
    return task.type == ANSWER and task.status is TaskStatus.PENDING


def _cancelled(queue: Queue, task_id: str) -> str:
    if queue.cancel_task(task_id):
        return "The task is cancelled."
    return "The task is running, and was asked to stop."


def _dashboard(task_id: str) -> str:
    """Return the URL of a task in the dashboard; empty if there is none."""
    try:
        return f"{reverse('taskx:dashboard')}task?{urlencode({'id': task_id})}"
    except NoReverseMatch:
        return ""


class DeadLetterAdmin(TaskAdmin):
    """Failed tasks."""

    list_filter = (Submitted, QueueName, Type, Tag)
    list_display = ("task_id", "type", "submitted", "ended", "error_type", "created_by")
    actions = ("requeue", "requeue_edited")


def _moment(ms: int | None) -> datetime | None:
    return None if ms is None else to_datetime(ms)
