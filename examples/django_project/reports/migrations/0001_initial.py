"""The first table."""

from django.db import migrations, models


class Migration(migrations.Migration):
    """Create reports."""

    initial = True
    operations = [  # noqa: RUF012  (Django's own style)
        migrations.CreateModel(
            name="Report",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("task_id", models.CharField(max_length=255, unique=True)),
                ("title", models.CharField(max_length=200)),
                ("rows", models.PositiveIntegerField()),
            ],
        ),
    ]
