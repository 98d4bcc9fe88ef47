"""Reports in the admin, beside the tasks and schedules of TaskX."""

from django.contrib import admin

from .models import Report

admin.site.register(Report, list_display=("title", "rows", "total", "sent", "created_at"))
