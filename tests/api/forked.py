"""Work in a child process that may be killed at any moment."""

import os
import signal
import time
from collections.abc import Callable

import torch


def forked(work: Callable[[], None], kill_when: Callable[[], bool]) -> int:
    """Run `work` in a child process; kill -9 it as soon as `kill_when` says so. Returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's other threads are not here, and torch would wait for them
            work()
            os._exit(0)
        except BaseException:
            os._exit(9)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if kill_when():
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.0002)
