"""TaskX in Django's admin: tasks, dead letters and schedules.

The pages read the tables. All changes are made by the queue, so the admin has no rules about tasks.
"""

from django.contrib import admin

from taskx.contrib.django.admin.schedules import ScheduleAdmin
from taskx.contrib.django.admin.tasks import DeadLetterAdmin, TaskAdmin
from taskx.contrib.django.models import DeadLetter, Schedule, Task

admin.site.register(Task, TaskAdmin)
admin.site.register(DeadLetter, DeadLetterAdmin)
admin.site.register(Schedule, ScheduleAdmin)
