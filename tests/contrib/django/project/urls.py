"""The addresses of the project of the tests."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path

from taskx.contrib.django import dashboard

urlpatterns = [
    path("admin/", admin.site.urls),
    path("tasks/", dashboard()),
]
