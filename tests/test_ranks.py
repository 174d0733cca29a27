"""Processes of one run end together."""

import subprocess
import sys
from pathlib import Path

RANK = """
import sys, time
from runs import ranks
ranks.end_with_leader()
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
"""
LEADER = """
import os, subprocess, sys
seconds, leaves, rank = sys.argv[1:]
launched = subprocess.Popen(
    [sys.executable, "-c", rank, seconds],
    env=os.environ | {"LOCAL_RANK": "3"},
    stdout=subprocess.PIPE,
)
launched.stdout.readline()
os._exit(9) if leaves == "leaves" else sys.exit(launched.wait())
"""


def lead(seconds: float, then: str) -> subprocess.CompletedProcess[str]:
    """A process that launches a rank of `seconds`, and then leaves it alone or waits for it."""
    # This returns when the rank, too, has closed the stderr that it shares with its leader.
    return subprocess.run(
        [sys.executable, "-c", LEADER, str(seconds), then, RANK],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=50,
    )  # fmt: skip


def test_a_launched_process_ends_when_the_one_that_launched_it_is_gone() -> None:
    assert "rank 3 ends" in lead(60, "leaves").stderr


def test_and_not_before() -> None:
    waited = lead(1.5, "waits")
    assert waited.returncode == 0 and waited.stderr == ""
