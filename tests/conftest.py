"""Load shared_fixtures.py where tests run, but not where pytest-xdist only hands them out: its imports take ten seconds."""


def pytest_configure(config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
