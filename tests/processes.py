"""Child processes that tests interrupt."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def start_interruptible(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a process that Ctrl-C ends, even where the test run itself ignores SIGINT.

    A shell's background jobs ignore it, and so would their children.
    """
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
