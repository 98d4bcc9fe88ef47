"""The tables. Read tasks by a queue; these models show the stored rows, such as in the admin.

The columns of ``TaskRow`` are those of ``taskx.tasks.record``: times are milliseconds since 1970, and lists
and objects are JSON text. Do not save or delete rows by these models: the rules about tasks are in the
queue, which changes a row only if it is still as it was read.
"""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage
from django.db import models
from django.db.models import Q

from taskx.contrib.django.fields import LongField, NameField
from taskx.node.schedules import PREFIX
from taskx.tasks.lifecycle import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING
from taskx.tasks.record import FOR_TURN, FREE


def _name(verbose: str, length: int = 255, **options: Any) -> NameField:
    return NameField(verbose, max_length=length, **{"default": "", **options})


def _key(verbose: str, length: int = 255) -> NameField:
    return NameField(verbose, max_length=length, null=True)


def _text(verbose: str) -> LongField:
    return LongField(verbose, default="")


def _optional_text(verbose: str) -> LongField:
    return LongField(verbose, null=True)


def _time(verbose: str) -> models.BigIntegerField:
    return models.BigIntegerField(verbose, null=True)


def _number(verbose: str, **options: Any) -> models.BigIntegerField:
    return models.BigIntegerField(verbose, **(options or {"default": 0}))


# Django warns that MySQL has no conditions of indexes and constraints, and may refuse long unique texts. A
# migration makes what the models mean, and all names fit in the indexes of MySQL.
_NEEDLESS = frozenset({"models.W036", "models.W037", "mysql.W003"})


class Row(models.Model):
    """A row of a table with indexes that not all databases have."""

    class Meta:
        abstract = True

    @classmethod
    def check(cls, **kwargs: Any) -> list[CheckMessage]:
        """Return what Django finds wrong, without warnings that do not hold for these tables."""
        return [found for found in super().check(**kwargs) if found.id not in _NEEDLESS]


class TaskRow(Row):
    """A task. The indexes of running the queue hold unfinished tasks only."""

    seq = models.BigAutoField("number", primary_key=True)
    task_id = NameField("id", max_length=255, db_column="id")
    type = NameField("type", max_length=255)
    status = NameField("status", max_length=20, default=PENDING)
    params = LongField("params", default="{}")
    result = _optional_text("result")
    error = _text("error")
    progress = _number("progress")
    message = _text("message")
    created_by = _name("created by")
    created_at = models.BigIntegerField("created at")
    started_at = _time("started at")
    completed_at = _time("completed at")
    duration = models.FloatField("duration in seconds", default=0.0)
    priority = _number("priority")
    run_at = _time("run at")
    timeout = models.FloatField("timeout in seconds", null=True)
    max_attempts = _number("most attempts", null=True)
    max_crashes = _number("most crashes", null=True)
    retry = _optional_text("retry policy")
    unique_key = _key("unique key", 500)
    unique_scope = _key("scope of the unique key")
    depends_on = _optional_text("parents")
    on_parent_failure = _key("on failure of a parent")
    concurrency_key = _key("concurrency key", 500)
    expires_at = _time("expires at")
    tags = _optional_text("tags")
    errors = _number("failed attempts")
    crashes = _number("crashes")
    interruptions = _number("interruptions")
    snoozes = _number("snoozes")
    starts = _number("starts")
    cancel_requested_at = _time("cancel requested at")
    dead_letter = _number("dead letter")
    error_type = _text("type of the error")
    traceback = _text("traceback")
    owner = _name("id of the node")
    worker = _name("worker", 500)
    earlier_attempts = _text("earlier attempts")
    stuck_on = _name("node of a stuck thread")
    checkpoints = _optional_text("checkpoints")
    log = _text("log")
    version = _key("version of the executor")
    cost = _optional_text("cost")
    held = _number("reason of waiting")
    waiting_on = _key("waits for the task")
    unique_lock = _key("unique key held", 500)
    turn = _key("concurrency key held", 500)

    class Meta:
        db_table = "taskx_task"
        verbose_name = "task"
        verbose_name_plural = "tasks"
        default_permissions = ()
        constraints = (
            models.UniqueConstraint(fields=("task_id",), name="taskx_id"),
            models.UniqueConstraint(
                fields=("unique_lock",), condition=Q(unique_lock__isnull=False), name="taskx_unique"
            ),
            models.UniqueConstraint(
                fields=("turn",), condition=Q(turn__isnull=False), name="taskx_turn"
            ),
        )
        indexes = (
            models.Index(fields=("created_at", "seq"), name="taskx_created"),
            models.Index(
                fields=("owner", "type", "-priority", "seq"),
                condition=Q(status=PENDING, held=FREE),
                name="taskx_ready",
            ),
            models.Index(
                fields=("held", "run_at"),
                condition=Q(status=PENDING, held__gt=FREE),
                name="taskx_held",
            ),
            models.Index(
                fields=("concurrency_key", "seq"),
                condition=Q(status=PENDING, held=FOR_TURN),
                name="taskx_line",
            ),
            models.Index(
                fields=("waiting_on",), condition=Q(waiting_on__isnull=False), name="taskx_waiting"
            ),
            models.Index(
                fields=("expires_at",),
                condition=Q(expires_at__isnull=False),
                name="taskx_expiring",
            ),
            models.Index(fields=("owner",), condition=Q(status=RUNNING), name="taskx_running"),
            models.Index(fields=("stuck_on",), condition=Q(stuck_on__gt=""), name="taskx_stuck"),
            *(
                models.Index(
                    fields=("created_at", "seq"),
                    condition=Q(status=status),
                    name=f"taskx_{status}",
                )
                for status in (COMPLETED, FAILED, CANCELLED)
            ),
        )

    def __str__(self) -> str:
        return f"{self.type} {self.task_id}"


class ParentRow(models.Model):
    """A pair of a task and one of its parents, which may not exist."""

    parent = _name("parent")
    child = _name("task")

    class Meta:
        db_table = "taskx_parent"
        verbose_name = "parent of a task"
        verbose_name_plural = "parents of tasks"
        default_permissions = ()
        constraints = (
            models.UniqueConstraint(fields=("parent", "child"), name="taskx_parent_child"),
        )
        indexes = (models.Index(fields=("child",), name="taskx_parent_of"),)

    def __str__(self) -> str:
        return f"{self.parent} → {self.child}"


class TagRow(models.Model):
    """A tag of a task, or the label of its flow. The tasks of a tag are one span of its index."""

    tag = _name("tag", 500)
    at = _number("created at")
    task = _number("number of the task")

    class Meta:
        db_table = "taskx_tag"
        verbose_name = "tag of a task"
        verbose_name_plural = "tags of tasks"
        default_permissions = ()
        constraints = (
            models.UniqueConstraint(fields=("tag", "at", "task"), name="taskx_tag_task"),
        )
        indexes = (models.Index(fields=("task",), name="taskx_tag_of"),)

    def __str__(self) -> str:
        return self.tag


class NoteRow(Row):
    """Everything that is not a task, such as a schedule, a pause or a node: a text under a name."""

    name = NameField("name", max_length=700, primary_key=True)
    text = _text("text")
    version = models.BigIntegerField("version")

    class Meta:
        db_table = "taskx_note"
        verbose_name = "note"
        verbose_name_plural = "notes"
        default_permissions = ()

    def __str__(self) -> str:
        return self.name


# --- what the admin shows; its permissions are those of these models


class Task(TaskRow):
    """A task, in the admin."""

    class Meta:
        proxy = True
        verbose_name = "task"
        verbose_name_plural = "tasks"
        default_permissions = ("change", "delete", "view")
        permissions = (("answer_task", "Can give answers that tasks wait for"),)


class DeadLetterManager(models.Manager["DeadLetter"]):
    """The failed tasks."""

    def get_queryset(self) -> models.QuerySet[DeadLetter]:
        return super().get_queryset().filter(status=FAILED)


class DeadLetter(TaskRow):
    """A failed task, in the admin."""

    objects = DeadLetterManager()

    class Meta:
        proxy = True
        verbose_name = "dead letter"
        verbose_name_plural = "dead letters"
        default_permissions = ("change", "delete", "view")


class ScheduleManager(models.Manager["Schedule"]):
    """The notes that store schedules."""

    def get_queryset(self) -> models.QuerySet[Schedule]:
        # A span of the primary key.
        return super().get_queryset().filter(name__gt=PREFIX, name__lt=f"{PREFIX[:-1]}0")


class Schedule(NoteRow):
    """A schedule, in the admin."""

    objects = ScheduleManager()

    class Meta:
        proxy = True
        verbose_name = "schedule"
        verbose_name_plural = "schedules"
        ordering = ("name",)

    @staticmethod
    def note_of(name: str) -> str:
        """Return the name of the note of a schedule."""
        return PREFIX + name

    def __str__(self) -> str:
        name: str = self.name
        return name.removeprefix(PREFIX)
