"""Celery without Redis: kombu's MongoDB transport, and results in the same database."""

from __future__ import annotations

from pymongo import MongoClient

from benchmarks.mongo.store import url_of
from benchmarks.peers.celery_peer import OnCelery
from benchmarks.peers.services import Services


class CeleryOnMongo(OnCelery):
    """Celery with its defaults: if it found no message, it polls again after a second."""

    poll_interval = 0.02  # each check is a command to the measured server

    def __init__(self, folder: str, workers: int, url: str) -> None:
        place = url_of(url, folder)
        self._client: MongoClient[dict[str, object]] = MongoClient(place)
        self._results = self._client.get_default_database()["celery_taskmeta"]
        super().__init__(Services(folder), place, place, workers)

    def finished(self) -> int:
        return self._results.estimated_document_count()

    def close(self) -> None:
        self._client.close()
        super().close()
