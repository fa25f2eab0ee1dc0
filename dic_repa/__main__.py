"""The process that is `dic-repa` or `python -m dic_repa`: Ctrl-C ends it with one line, at whatever moment it comes.

Python shows a traceback where it comes while modules are imported or the process ends, and drops it in a destructor or
a callback. So this module imports as little as there is before it listens.
"""

import _thread
import os
import signal
import sys
import time

_interrupted = False


def main() -> None:
    """Run the command line; see `dic_repa.cli.main`."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a process in the background ignores it
        from dic_repa.cli import main as run

        run()
    code = 1
    try:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _interrupt_again
        from dic_repa.cli import main as run

        run()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        raise
    except BaseException:  # from C, an interrupted import comes as an ImportError
        if not _interrupted:
            raise
        code = 130
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(code)
    finally:
        signal.signal(signal.SIGINT, lambda *_: _leave(code))


def _interrupt(_number, _frame) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _interrupt_again(unraisable) -> None:
    """Where Python would drop an exception: Ctrl-C once more, a moment later."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt) or not hasattr(signal, "pthread_kill"):
        sys.__unraisablehook__(unraisable)
        return

    main_thread = _thread.get_ident()

    def later() -> None:
        time.sleep(0.05)
        signal.pthread_kill(main_thread, signal.SIGINT)

    _thread.start_new_thread(later, ())


def _leave(code: int) -> None:
    """While the process ends, with its work done or its fault told."""
    if not code:
        os.write(2, b"interrupted at the end; all is written\n")
    os._exit(code or 130)


if __name__ == "__main__":
    main()
