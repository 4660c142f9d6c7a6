"""What the processes of the mesh are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from local.fleet import Commands, Fleet
from local.layout import Layout
from local.servers import Stores

VARIABLE = "KIMBERLY_EMBEDDING_MODELS_DIRECTORY"


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    layout = Layout(tmp_path)
    return Fleet(layout, Stores(layout, durable=False), {}, ["worker-1"], Commands())


def test_workers_have_no_models_unless_whoever_starts_the_mesh_lends_some(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert VARIABLE not in fleet.worker("worker-1").environment
    monkeypatch.setenv(VARIABLE, "")
    assert VARIABLE not in fleet.worker("worker-1").environment


def test_workers_find_lent_models_from_wherever_they_run(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "models")
    assert fleet.worker("worker-1").environment[VARIABLE] == str(tmp_path / "models")


def test_replicas_have_sidecars_of_their_own_under_the_identity_of_their_service(
    tmp_path: Path,
) -> None:
    layout = Layout(tmp_path)
    fleet = Fleet(layout, Stores(layout, durable=False), {}, ["worker-1"], Commands(), replicas=2)
    assert fleet.services == {
        "auth": "auth",
        "auth-2": "auth",
        "memory": "memory",
        "memory-2": "memory",
        "jobs": "jobs",
        "jobs-2": "jobs",
    }
    assert set(fleet.sidecars) == {*fleet.services, "worker-1"}
