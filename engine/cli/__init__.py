"""The command line: arguments in, text or JSON out. Knows the facade, no kernels.

main() is the entry point of gguf-engine and `python -m engine`. Errors become one line on stderr and exit status 2;
an interrupt ends with 130, what was written so far stays written.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 1


def main() -> None:
    """Run the command line in sys.argv and exit."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    _replace_closed_streams()
    try:
        status = _run([argument for argument in arguments if argument != "--debug"], debug)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the command had begun
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        status = EXIT_PIPE
    if status == EXIT_PIPE:
        # The reader is gone; keep the interpreter from complaining about it when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _replace_closed_streams() -> None:
    """Python has no stream at all where the caller closed one (>&-)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open as long as the process


def _run(arguments: list[str], debug: bool) -> int:
    from engine.cli.interrupts import Interrupts

    with Interrupts():
        import typer

        from engine.cli.app import app
        from engine.errors import EngineError

    try:
        return app(arguments, prog_name="gguf-engine", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_PIPE
    except Exception as error:
        if debug:
            raise
        format_usage = getattr(error, "format_message", None)  # typer's own errors about arguments
        if format_usage is not None:
            if not format_usage():  # no command was named: the help is on the screen
                return EXIT_ERROR
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "gguf-engine"
            message = f"{format_usage()} (see {command} --help)"
        elif isinstance(error, EngineError):
            message = str(error)
        elif isinstance(error, OSError):
            message = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        elif isinstance(error, MemoryError):
            message = "the system gives no more memory: close other programs, or take a smaller model, text or context"
        else:
            message = f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return EXIT_ERROR
