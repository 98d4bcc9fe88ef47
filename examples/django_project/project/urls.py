"""The URLs and their views."""

from django.contrib import admin
from django.urls import path
from reports import views

from taskx.contrib.django import dashboard

urlpatterns = [
    path("", views.show_all, name="reports"),
    path("reports/", views.submit, name="submit"),
    path("reports/<int:pk>/", views.show, name="report"),
    path("reports/<int:pk>/cancel/", views.cancel, name="cancel"),
    path("admin/", admin.site.urls),
    path("tasks/", dashboard()),  # for staff who may view tasks
]
