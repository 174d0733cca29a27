"""How a loader process of a run ends: when its trainer says so, and not by a signal to the job."""

import os
import signal
import threading


def leave_signals_to_the_trainer(worker: int) -> None:
    """A signal to end reaches every process of a job: a loader that obeyed would break the step
    that its trainer still finishes and saves. Only the trainer's own SIGTERM ends a loader.
    """
    for which in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(which, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # everywhere but on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
