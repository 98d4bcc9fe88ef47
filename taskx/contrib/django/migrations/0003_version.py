"""Add the column for the version of the executor, and the permission to give answers."""

from __future__ import annotations

from django.db import migrations

import taskx.contrib.django.fields


class Migration(migrations.Migration):
    dependencies = [("taskx", "0002_tune")]

    operations = [
        migrations.AddField(
            model_name="taskrow",
            name="version",
            field=taskx.contrib.django.fields.NameField(
                max_length=255, null=True, verbose_name="version of the executor"
            ),
        ),
        migrations.AlterModelOptions(
            name="task",
            options={
                "default_permissions": ("change", "delete", "view"),
                "permissions": (("answer_task", "Can give answers that tasks wait for"),),
                "verbose_name": "task",
                "verbose_name_plural": "tasks",
            },
        ),
    ]
