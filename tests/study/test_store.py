from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, event, inspect, text

from palimpsest.core.errors import CannotWrite
from palimpsest.study.store import Store, connect, downgrade, upgrade
from palimpsest.study.tables import ArtifactRow, CellRow, FindingRow, SeriesRow, Table, now

TABLES = {"studies", "cells", "findings", "series", "artifacts"}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request, tmp_path) -> Iterator[str]:
    """An empty database, in a file or on a real server."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.sqlite'}"
        return
    server = request.getfixturevalue("postgres")
    name = f"test_{uuid4().hex}"
    engine = connect(server).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield server.replace("/postgres?", f"/{name}?")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def store(url) -> Iterator[Store]:
    opened = Store(url)
    yield opened
    opened.close()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) & TABLES


def cell(key: str = "c1", value: float = 0.25, status: str = "done") -> CellRow:
    content = {
        "audit": "utility",
        "name": "test_accuracy",
        "value": value,
        "controls": [0.1, 1e-300],
        "note": "ü",
    }
    finding = FindingRow(
        position=0,
        audit="utility",
        name="test_accuracy",
        value=value,
        k=None,
        judgement="good",
        content=content,
    )
    return CellRow(
        key=key, method="ssd", label="ssd", request="label = 3", seeds={"training": 0}, status=status, reason="",
        detail="", verdict="removed", reasons=["because"], facts={"n": 1}, seconds=0.5, peak_bytes=2**40,
        started=now(), finished=now(), findings=[finding], series=[SeriesRow(name="cost", rows=[{"what": "x"}])],
    )  # fmt: skip


def artifact(key: str = "a1", sha256: str = "00") -> ArtifactRow:
    return ArtifactRow(key=key, kind="original", place="p", sha256=sha256, seconds=1.5, created=now())


def test_what_is_put_comes_back_to_the_last_bit(store):
    store.put_cell(cell(), artifact())
    store.put_study("s1", "first", {"forget": ["label=3"]}, ["c1"])
    row = store.cells(["c1", "absent"])["c1"]
    assert row.findings[0].content == cell().findings[0].content
    assert (row.verdict, row.reasons, row.facts, row.peak_bytes) == ("removed", ["because"], {"n": 1}, 2**40)
    assert row.series[0].rows == [{"what": "x"}]
    assert abs(row.finished - now()) < timedelta(minutes=1)
    assert store.statuses(["c1", "absent"]) == {"c1": "done"}
    assert store.artifacts(["a1", "absent"])["a1"].seconds == 1.5
    study = store.study("s1")
    assert study is not None and study.cells == ["c1"]
    assert store.study("absent") is None


def test_a_cell_put_again_replaces_the_old_one_with_all_that_belongs_to_it(store):
    store.put_cell(cell(value=0.1))
    store.put_cell(cell(value=0.2))
    assert [item.value for item in store.cells(["c1"])["c1"].findings] == [0.2]
    with store.engine.connect() as connection:
        for table in ("findings", "series"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 1


def test_a_cell_whose_writing_fails_half_way_leaves_the_old_one_whole(store):
    store.put_cell(cell(value=0.1))

    def stop(connection, cursor, statement, *rest):
        if statement.startswith("INSERT INTO series"):
            raise KeyboardInterrupt

    event.listen(store.engine, "before_cursor_execute", stop)
    with pytest.raises(KeyboardInterrupt):
        store.put_cell(cell(value=0.2), artifact())
    event.remove(store.engine, "before_cursor_execute", stop)
    row = store.cells(["c1"])["c1"]
    assert ([item.value for item in row.findings], len(row.series)) == ([0.1], 1)
    assert store.artifacts(["a1"]) == {}


def test_migrations_go_up_to_what_the_classes_say_and_down_to_nothing(url):
    engine = connect(url)
    upgrade(engine)
    found = inspect(engine)
    for name, table in Table.metadata.tables.items():
        columns = {column["name"]: column["nullable"] for column in found.get_columns(name)}
        assert columns == {column.name: bool(column.nullable) for column in table.columns}, name
        assert {i for index in found.get_indexes(name) for i in index["column_names"]} == {
            column.name for column in table.columns if column.index
        }
    upgrade(engine)
    downgrade(engine)
    assert tables(engine) == set()
    upgrade(engine)
    assert tables(engine) == TABLES
    engine.dispose()


def test_a_migration_cut_short_leaves_nothing_and_the_next_one_works(url):
    engine = connect(url)

    def stop(connection, cursor, statement, *rest):
        if "CREATE TABLE findings" in statement:
            raise KeyboardInterrupt

    event.listen(engine, "before_cursor_execute", stop)
    with pytest.raises(KeyboardInterrupt):
        upgrade(engine)
    event.remove(engine, "before_cursor_execute", stop)
    engine.dispose()
    assert tables(connect(url)) == set()
    Store(url).close()
    assert tables(connect(url)) == TABLES


def test_many_processes_may_open_and_write_one_store_at_once(url):
    problems: list[Exception] = []

    def write(number: int) -> None:
        try:
            mine = Store(url)
            for turn in range(3):
                mine.put_cell(cell(f"shared {turn}", value=0.5), artifact(f"shared {turn}"))
                mine.put_cell(cell(f"own {number} {turn}"))
            mine.close()
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    opened = Store(url)
    keys = [f"shared {turn}" for turn in range(3)] + [
        f"own {n} {turn}" for n in range(4) for turn in range(3)
    ]
    assert {key: len(row.findings) for key, row in opened.cells(keys).items()} == dict.fromkeys(keys, 1)
    opened.close()


def test_a_store_of_a_newer_release_is_refused(url):
    store = Store(url)
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(CannotWrite, match="9999"):
        Store(url)


def test_a_damaged_file_is_a_clear_error(tmp_path):
    (tmp_path / "study.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(CannotWrite, match=r"study\.sqlite"):
        Store(f"sqlite:///{tmp_path / 'study.sqlite'}")


@pytest.mark.parametrize(
    "url",
    [
        "no url",
        "sqlite:////proc/nowhere/study.sqlite",
        "postgresql://nobody:secret@127.0.0.1:1/none",
        "strange://x",
    ],
)
def test_a_store_that_cannot_be_opened_is_a_clear_error_without_passwords(url):
    with pytest.raises(CannotWrite) as problem:
        Store(url)
    assert "secret" not in str(problem.value)


def test_the_file_survives_the_death_of_its_writer(tmp_path):
    """Written ahead and flushed: what was committed is read by a process that knows nothing of the first."""
    path = tmp_path / "study.sqlite"
    store = Store(f"sqlite:///{path}")
    store.put_cell(cell())
    copy = tmp_path / "copy.sqlite"
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT status FROM cells").fetchall() == [("done",)]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()
