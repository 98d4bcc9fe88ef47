"""Add the cost of a task."""

from __future__ import annotations

from django.db import migrations

import taskx.contrib.django.fields


class Migration(migrations.Migration):
    dependencies = [("taskx", "0003_version")]

    operations = [
        migrations.AddField(
            "taskrow", "cost", taskx.contrib.django.fields.LongField("cost", null=True)
        )
    ]
