"""A plugin for pytest: each outcome on a line of its own when it is known, so that a run that is cut leaves what it found."""

import json
import os

MARK = "\0"


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        write(report)


def pytest_collectreport(report):
    if report.outcome == "failed":
        write(report)


def write(report):
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that started the workers hears of it as well
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    because = crash.message if crash else report.longreprtext.strip().splitlines()[-1] if report.longreprtext else ""
    because = " ".join(because.split())[:300].replace("|", "¦")
    print("\n" + MARK + json.dumps([report.outcome, report.nodeid, because]), flush=True)
