"""Children of a fork that must answer: nothing of them outlives a test."""

import faulthandler
import os
import traceback


def in_child(action, seconds=20):
    """Run action() in the child of a fork; fails if it raises there, or takes longer."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.dump_traceback_later(seconds, exit=True)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the child failed, or waited for ever"
