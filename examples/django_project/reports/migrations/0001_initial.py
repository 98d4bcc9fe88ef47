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
                ("title", models.CharField(max_length=200)),
                ("rows", models.PositiveIntegerField()),
                ("task_id", models.CharField(default="", max_length=255)),
                ("total", models.PositiveIntegerField(null=True)),
                ("sent", models.BooleanField(default=False)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
        ),
    ]
