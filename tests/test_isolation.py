import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.run.isolation import ALLOCATOR_VARIABLE, SETTINGS, WatchedVariables, apply_settings

ROOT = Path(__file__).resolve().parents[1]
HIDING = """
import importlib, importlib.metadata, importlib.util, sys
from bench.run.isolation import hide_packages
hide_packages({"jinja2", "rich"})
"""


def ran(code):
    done = subprocess.run(
        [sys.executable, "-c", HIDING + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def environment(monkeypatch):
    """Whatever a test does to the environment is undone, also to variables that it adds."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in SETTINGS:
        os.environ.pop(name, None)
    return os.environ


def test_a_hidden_package_is_not_found():
    assert ran("print(importlib.util.find_spec('jinja2'))") == "None"


def test_a_hidden_package_does_not_import():
    assert (
        ran("""
try:
    import jinja2
except ModuleNotFoundError as error:
    print(error.name)
""")
        == "jinja2"
    )


def test_a_module_of_a_hidden_package_does_not_import():
    assert (
        ran("""
try:
    import rich.console
except ModuleNotFoundError as error:
    print(error.name)
""")
        == "rich"
    )


def test_other_packages_import_as_ever():
    assert (
        ran("import pydantic, click.testing; print(importlib.util.find_spec('click') is not None)") == "True"
    )


def test_a_package_whose_name_only_begins_alike_is_not_hidden():
    assert (
        ran("""
hide_packages({"cli", "pydantic_"})
import click, pydantic, pydantic_core
print("ok")
""")
        == "ok"
    )


def test_versions_can_still_be_read():
    assert (
        ran("print(importlib.metadata.version('jinja2') > '3', importlib.metadata.version('click') > '8')")
        == "True True"
    )


def test_hiding_again_replaces_what_is_hidden():
    assert (
        ran("""
hide_packages({"click"})
import jinja2
print(importlib.util.find_spec("click"), sum(f.__name__ == "_Hiding" for f in sys.meta_path
                                             if isinstance(f, type)))
""")
        == "None 1"
    )


def test_the_allocator_variable_is_restored_and_what_was_wanted_is_told(environment):
    environment[ALLOCATOR_VARIABLE] = SETTINGS[ALLOCATOR_VARIABLE]
    watched = WatchedVariables()
    with watched:
        environment[ALLOCATOR_VARIABLE] = "expandable_segments:True"
    assert environment[ALLOCATOR_VARIABLE] == SETTINGS[ALLOCATOR_VARIABLE]
    assert watched.changed == {ALLOCATOR_VARIABLE: "expandable_segments:True"}


def test_the_allocator_s_older_name_rules_no_run(environment):
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    apply_settings()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert environment[ALLOCATOR_VARIABLE] == SETTINGS[ALLOCATOR_VARIABLE]


def test_the_variable_is_restored_when_the_library_raises(environment):
    with pytest.raises(RuntimeError), WatchedVariables():
        environment[ALLOCATOR_VARIABLE] = "expandable_segments:True"
        raise RuntimeError
    assert environment[ALLOCATOR_VARIABLE] == SETTINGS[ALLOCATOR_VARIABLE]


def test_changes_of_several_passages_add_up(environment):
    watched = WatchedVariables()
    with watched:
        environment["OMP_NUM_THREADS"] = "77"
    with watched:
        environment["CUDA_MODULE_LOADING"] = "EAGER"
    assert watched.changed == {"OMP_NUM_THREADS": "77", "CUDA_MODULE_LOADING": "EAGER"}


def test_a_variable_that_nothing_depends_on_is_not_told(environment):
    watched = WatchedVariables()
    with watched:
        environment["SOME_BANNER"] = "off"
    assert watched.changed == {}


def test_a_watched_variable_that_a_library_removed_is_told(environment):
    environment["OMP_NUM_THREADS"] = "2"
    watched = WatchedVariables()
    with watched:
        del environment["OMP_NUM_THREADS"]
    assert "OMP_NUM_THREADS" in watched.changed
