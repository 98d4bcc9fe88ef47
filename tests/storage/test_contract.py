"""The contract of the eight methods, which every repository keeps."""

import pytest

from taskx import MemoryRepository, SQLiteRepository
from taskx.stores.adapter import EightMethodAdapter
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.testing import RepositoryContract

from .repositories import MAKERS, Scramble, TinyRepository, coded, thirteen_fields_only


class TestMemory(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self):
        return MemoryRepository()


@pytest.mark.parametrize("durability", ["accepted", "full", "process"])
class TestSQLite(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self, tmp_path, durability):
        with SQLiteRepository(tmp_path / "tasks.db", durability) as repository:
            yield repository


@pytest.mark.parametrize("kind", ["mongomock", "mongo", "mongo-set"])
class TestMongo(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self, tmp_path, kind):
        with MAKERS[kind](tmp_path, SYSTEM_CLOCK) as repository:
            yield repository


@pytest.mark.parametrize("kind", ["django-sqlite", "django-postgres", "django-mariadb"])
class TestDjango(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self, tmp_path, kind):
        with MAKERS[kind](tmp_path, SYSTEM_CLOCK) as repository:
            yield repository


@pytest.mark.postgres
class TestPostgres(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self, tmp_path):
        with MAKERS["postgres"](tmp_path, SYSTEM_CLOCK) as repository:
            yield repository


@pytest.mark.parametrize("kind", ["memory", "sqlite", "mongomock", "example"])
class TestCoded(RepositoryContract):
    """The contract also holds with a codec."""

    guards_moves = True

    @pytest.fixture
    def repository(self, tmp_path, kind):
        with coded(kind, tmp_path, SYSTEM_CLOCK, Scramble()) as repository:
            yield repository


class TestUsersOwn(RepositoryContract):
    @pytest.fixture
    def repository(self):
        return TinyRepository()


class TestUsersOwnWithThirteenFields(RepositoryContract):
    keeps_every_field = False

    @pytest.fixture
    def repository(self):
        return thirteen_fields_only()


class TestAdapter(RepositoryContract):
    guards_moves = True

    @pytest.fixture
    def repository(self):
        return EightMethodAdapter(TinyRepository())


class TestAdapterOfThirteenFields(RepositoryContract):
    guards_moves = True
    keeps_every_field = False

    @pytest.fixture
    def repository(self):
        return EightMethodAdapter(thirteen_fields_only())


class TestTheContractItself:
    """The contract finds defects: each of these repositories breaks one rule and fails one test."""

    @pytest.mark.parametrize(
        ("broken", "test"),
        [
            ("create", "test_an_id_is_stored_once"),
            ("list", "test_lists_are_newest_first"),
            ("count", "test_lists_are_newest_first"),
            ("get_by_id", "test_the_store_shares_no_object_with_its_callers"),
            ("delete", "test_an_unknown_id_raises_task_not_found"),
        ],
    )
    def test_a_broken_method_is_found(self, broken, test):
        kept = {}

        class Broken(TinyRepository):
            def create(self, task):
                if broken == "create":
                    self._put(task)
                else:
                    super().create(task)

            def get_by_id(self, task_id):
                task = super().get_by_id(task_id)
                return kept.setdefault(task_id, task) if broken == "get_by_id" else task

            def list(self, filter):
                found = super().list(filter)
                return found[::-1] if broken == "list" else found

            def count(self, filter):
                return len(self.list(filter)) if broken == "count" else super().count(filter)

            def delete(self, task_id):
                if broken != "delete" or task_id in self._texts:
                    super().delete(task_id)

        with pytest.raises(AssertionError):
            getattr(RepositoryContract(), test)(Broken())
        getattr(RepositoryContract(), test)(TinyRepository())
