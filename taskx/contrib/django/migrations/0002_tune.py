"""Set what models cannot express: the storage of PostgreSQL, and the indexes of MySQL and MariaDB."""

from __future__ import annotations

from typing import Any

from django.db import migrations, models

# Rows change a few times and are then removed, so vacuum must come sooner than after a fifth of a large
# table. Room in the pages keeps the changes of progress and checkpoints out of the indexes.
_TASKS = (
    "ALTER TABLE taskx_task SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, "
    "autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_insert_scale_factor = 0.05, "
    "autovacuum_analyze_scale_factor = 0.05)"
)
_NOTES = (
    "ALTER TABLE taskx_note SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, "
    "autovacuum_vacuum_threshold = 500)"
)

# MySQL has no partial indexes: Django made these of all rows. The columns of their conditions come first
# here, so that those of other rows are not read. One index is enough for all tasks that have ended, and the
# few that run need none. A later migration that removes one of the dropped indexes must allow for this.
_WHOLE: dict[str, list[str]] = {
    "taskx_ready": ["status", "held", "owner", "type", "-priority", "seq"],
    "taskx_held": ["status", "held", "run_at"],
    "taskx_line": ["status", "held", "concurrency_key", "seq"],
    "taskx_waiting": ["status", "held", "waiting_on"],
    "taskx_running": [],
    "taskx_completed": ["status", "created_at", "seq"],
    "taskx_failed": [],
    "taskx_cancelled": [],
}


def tune(apps: Any, editor: Any) -> None:
    """Tune the tables."""
    if editor.connection.vendor == "postgresql":
        for statement in (_TASKS, _NOTES):
            editor.execute(statement)
    elif editor.connection.vendor == "mysql":
        model = apps.get_model("taskx", "TaskRow")
        for index in model._meta.indexes:
            if index.name in _WHOLE:
                editor.remove_index(model, index)
                if fields := _WHOLE[index.name]:
                    editor.add_index(model, models.Index(fields=fields, name=index.name))
        for unique in model._meta.constraints:
            if unique.condition is not None:  # that a value is not NULL, which is always unique
                whole = models.UniqueConstraint(fields=unique.fields, name=unique.name)
                editor.add_constraint(model, whole)


class Migration(migrations.Migration):
    dependencies = [("taskx", "0001_initial")]

    # MySQL changes no table inside a transaction. The other databases do this in that of the migration.
    operations = [
        migrations.RunPython(tune, migrations.RunPython.noop, elidable=False, atomic=False)
    ]
