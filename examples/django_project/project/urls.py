"""The URLs and their views."""

from django.urls import path
from reports import views

urlpatterns = [
    path("", views.show_all, name="tasks"),
    path("tasks/", views.submit, name="submit"),
    path("tasks/<str:task_id>/", views.show, name="task"),
    path("tasks/<str:task_id>/cancel/", views.cancel, name="cancel"),
]
