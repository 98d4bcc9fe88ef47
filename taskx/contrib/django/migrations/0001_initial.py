"""The tables of tasks, of their parents and tags, and of notes."""

from __future__ import annotations

from django.db import migrations, models

import taskx.contrib.django.fields


class Migration(migrations.Migration):
    initial = True

    dependencies: list[tuple[str, str]] = []

    operations = [
        migrations.CreateModel(
            name="NoteRow",
            fields=[
                (
                    "name",
                    taskx.contrib.django.fields.NameField(
                        max_length=700, primary_key=True, serialize=False, verbose_name="name"
                    ),
                ),
                ("text", taskx.contrib.django.fields.LongField(default="", verbose_name="text")),
                ("version", models.BigIntegerField(verbose_name="version")),
            ],
            options={
                "verbose_name": "note",
                "verbose_name_plural": "notes",
                "db_table": "taskx_note",
                "default_permissions": (),
            },
        ),
        migrations.CreateModel(
            name="ParentRow",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "parent",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=255, verbose_name="parent"
                    ),
                ),
                (
                    "child",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=255, verbose_name="task"
                    ),
                ),
            ],
            options={
                "verbose_name": "parent of a task",
                "verbose_name_plural": "parents of tasks",
                "db_table": "taskx_parent",
                "default_permissions": (),
            },
        ),
        migrations.CreateModel(
            name="TagRow",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "tag",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=500, verbose_name="tag"
                    ),
                ),
                ("at", models.BigIntegerField(default=0, verbose_name="created at")),
                ("task", models.BigIntegerField(default=0, verbose_name="number of the task")),
            ],
            options={
                "verbose_name": "tag of a task",
                "verbose_name_plural": "tags of tasks",
                "db_table": "taskx_tag",
                "default_permissions": (),
            },
        ),
        migrations.CreateModel(
            name="TaskRow",
            fields=[
                (
                    "seq",
                    models.BigAutoField(primary_key=True, serialize=False, verbose_name="number"),
                ),
                (
                    "task_id",
                    taskx.contrib.django.fields.NameField(
                        db_column="id", max_length=255, verbose_name="id"
                    ),
                ),
                (
                    "type",
                    taskx.contrib.django.fields.NameField(max_length=255, verbose_name="type"),
                ),
                (
                    "status",
                    taskx.contrib.django.fields.NameField(
                        default="pending", max_length=20, verbose_name="status"
                    ),
                ),
                (
                    "params",
                    taskx.contrib.django.fields.LongField(default="{}", verbose_name="params"),
                ),
                ("result", taskx.contrib.django.fields.LongField(null=True, verbose_name="result")),
                ("error", taskx.contrib.django.fields.LongField(default="", verbose_name="error")),
                ("progress", models.BigIntegerField(default=0, verbose_name="progress")),
                (
                    "message",
                    taskx.contrib.django.fields.LongField(default="", verbose_name="message"),
                ),
                (
                    "created_by",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=255, verbose_name="created by"
                    ),
                ),
                ("created_at", models.BigIntegerField(verbose_name="created at")),
                ("started_at", models.BigIntegerField(null=True, verbose_name="started at")),
                ("completed_at", models.BigIntegerField(null=True, verbose_name="completed at")),
                ("duration", models.FloatField(default=0.0, verbose_name="duration in seconds")),
                ("priority", models.BigIntegerField(default=0, verbose_name="priority")),
                ("run_at", models.BigIntegerField(null=True, verbose_name="run at")),
                ("timeout", models.FloatField(null=True, verbose_name="timeout in seconds")),
                ("max_attempts", models.BigIntegerField(null=True, verbose_name="most attempts")),
                ("max_crashes", models.BigIntegerField(null=True, verbose_name="most crashes")),
                (
                    "retry",
                    taskx.contrib.django.fields.LongField(null=True, verbose_name="retry policy"),
                ),
                (
                    "unique_key",
                    taskx.contrib.django.fields.NameField(
                        max_length=500, null=True, verbose_name="unique key"
                    ),
                ),
                (
                    "unique_scope",
                    taskx.contrib.django.fields.NameField(
                        max_length=255, null=True, verbose_name="scope of the unique key"
                    ),
                ),
                (
                    "depends_on",
                    taskx.contrib.django.fields.LongField(null=True, verbose_name="parents"),
                ),
                (
                    "on_parent_failure",
                    taskx.contrib.django.fields.NameField(
                        max_length=255, null=True, verbose_name="on failure of a parent"
                    ),
                ),
                (
                    "concurrency_key",
                    taskx.contrib.django.fields.NameField(
                        max_length=500, null=True, verbose_name="concurrency key"
                    ),
                ),
                ("expires_at", models.BigIntegerField(null=True, verbose_name="expires at")),
                ("tags", taskx.contrib.django.fields.LongField(null=True, verbose_name="tags")),
                ("errors", models.BigIntegerField(default=0, verbose_name="failed attempts")),
                ("crashes", models.BigIntegerField(default=0, verbose_name="crashes")),
                ("interruptions", models.BigIntegerField(default=0, verbose_name="interruptions")),
                ("snoozes", models.BigIntegerField(default=0, verbose_name="snoozes")),
                ("starts", models.BigIntegerField(default=0, verbose_name="starts")),
                (
                    "cancel_requested_at",
                    models.BigIntegerField(null=True, verbose_name="cancel requested at"),
                ),
                ("dead_letter", models.BigIntegerField(default=0, verbose_name="dead letter")),
                (
                    "error_type",
                    taskx.contrib.django.fields.LongField(
                        default="", verbose_name="type of the error"
                    ),
                ),
                (
                    "traceback",
                    taskx.contrib.django.fields.LongField(default="", verbose_name="traceback"),
                ),
                (
                    "owner",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=255, verbose_name="id of the node"
                    ),
                ),
                (
                    "worker",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=500, verbose_name="worker"
                    ),
                ),
                (
                    "earlier_attempts",
                    taskx.contrib.django.fields.LongField(
                        default="", verbose_name="earlier attempts"
                    ),
                ),
                (
                    "stuck_on",
                    taskx.contrib.django.fields.NameField(
                        default="", max_length=255, verbose_name="node of a stuck thread"
                    ),
                ),
                (
                    "checkpoints",
                    taskx.contrib.django.fields.LongField(null=True, verbose_name="checkpoints"),
                ),
                ("log", taskx.contrib.django.fields.LongField(default="", verbose_name="log")),
                ("held", models.BigIntegerField(default=0, verbose_name="reason of waiting")),
                (
                    "waiting_on",
                    taskx.contrib.django.fields.NameField(
                        max_length=255, null=True, verbose_name="waits for the task"
                    ),
                ),
                (
                    "unique_lock",
                    taskx.contrib.django.fields.NameField(
                        max_length=500, null=True, verbose_name="unique key held"
                    ),
                ),
                (
                    "turn",
                    taskx.contrib.django.fields.NameField(
                        max_length=500, null=True, verbose_name="concurrency key held"
                    ),
                ),
            ],
            options={
                "verbose_name": "task",
                "verbose_name_plural": "tasks",
                "db_table": "taskx_task",
                "default_permissions": (),
                "indexes": [
                    models.Index(fields=["created_at", "seq"], name="taskx_created"),
                    models.Index(
                        condition=models.Q(("held", 0), ("status", "pending")),
                        fields=["owner", "type", "-priority", "seq"],
                        name="taskx_ready",
                    ),
                    models.Index(
                        condition=models.Q(("held__gt", 0), ("status", "pending")),
                        fields=["held", "run_at"],
                        name="taskx_held",
                    ),
                    models.Index(
                        condition=models.Q(("held", 4), ("status", "pending")),
                        fields=["concurrency_key", "seq"],
                        name="taskx_line",
                    ),
                    models.Index(
                        condition=models.Q(("waiting_on__isnull", False)),
                        fields=["waiting_on"],
                        name="taskx_waiting",
                    ),
                    models.Index(
                        condition=models.Q(("expires_at__isnull", False)),
                        fields=["expires_at"],
                        name="taskx_expiring",
                    ),
                    models.Index(
                        condition=models.Q(("status", "running")),
                        fields=["owner"],
                        name="taskx_running",
                    ),
                    models.Index(
                        condition=models.Q(("stuck_on__gt", "")),
                        fields=["stuck_on"],
                        name="taskx_stuck",
                    ),
                    models.Index(
                        condition=models.Q(("status", "completed")),
                        fields=["created_at", "seq"],
                        name="taskx_completed",
                    ),
                    models.Index(
                        condition=models.Q(("status", "failed")),
                        fields=["created_at", "seq"],
                        name="taskx_failed",
                    ),
                    models.Index(
                        condition=models.Q(("status", "cancelled")),
                        fields=["created_at", "seq"],
                        name="taskx_cancelled",
                    ),
                ],
            },
        ),
        migrations.AddConstraint(
            model_name="taskrow",
            constraint=models.UniqueConstraint(fields=("task_id",), name="taskx_id"),
        ),
        migrations.AddConstraint(
            model_name="taskrow",
            constraint=models.UniqueConstraint(
                condition=models.Q(("unique_lock__isnull", False)),
                fields=("unique_lock",),
                name="taskx_unique",
            ),
        ),
        migrations.AddConstraint(
            model_name="taskrow",
            constraint=models.UniqueConstraint(
                condition=models.Q(("turn__isnull", False)), fields=("turn",), name="taskx_turn"
            ),
        ),
        migrations.AddIndex(
            model_name="tagrow",
            index=models.Index(fields=["task"], name="taskx_tag_of"),
        ),
        migrations.AddConstraint(
            model_name="tagrow",
            constraint=models.UniqueConstraint(fields=("tag", "at", "task"), name="taskx_tag_task"),
        ),
        migrations.AddIndex(
            model_name="parentrow",
            index=models.Index(fields=["child"], name="taskx_parent_of"),
        ),
        migrations.AddConstraint(
            model_name="parentrow",
            constraint=models.UniqueConstraint(
                fields=("parent", "child"), name="taskx_parent_child"
            ),
        ),
        migrations.CreateModel(
            name="Task",
            fields=[],
            options={
                "verbose_name": "task",
                "verbose_name_plural": "tasks",
                "default_permissions": ("change", "delete", "view"),
                "proxy": True,
                "indexes": [],
                "constraints": [],
            },
            bases=("taskx.taskrow",),
        ),
        migrations.CreateModel(
            name="DeadLetter",
            fields=[],
            options={
                "verbose_name": "dead letter",
                "verbose_name_plural": "dead letters",
                "default_permissions": ("change", "delete", "view"),
                "proxy": True,
                "indexes": [],
                "constraints": [],
            },
            bases=("taskx.taskrow",),
        ),
        migrations.CreateModel(
            name="Schedule",
            fields=[],
            options={
                "verbose_name": "schedule",
                "verbose_name_plural": "schedules",
                "ordering": ("name",),
                "proxy": True,
                "indexes": [],
                "constraints": [],
            },
            bases=("taskx.noterow",),
        ),
    ]
