"""Ends a process of Flower's with the one that started it, wherever its main thread is.

Flower looks for the parent in a thread of its own and raises SIGINT in that thread. Python handles
signals in the main thread, and one that waits without a limit, as for a push that is tried again
for ever, never comes to it. A signal to the whole process wakes the main thread up.
"""

import os
import signal
import threading
import time

CHECK_S = 1.0


def exit_with_parent(check_s: float = CHECK_S) -> None:
    """From now on, tell this process to end once the one that started it is gone.

    Args:
        check_s: How often to look, in seconds.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(check_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
