"""How every command of ours ends: what it says, and the exit code.

    0    fine
    1    could not: what was given can be used, but the work failed (disk full, no compiler, a model that cannot be traced, a bug)
    2    bad input: a file, folder, word or number that was given cannot be used
    130  interrupted (Ctrl-C); 141: whoever read the output stopped reading (`| head`), which is no fault and said nowhere

Whatever goes wrong ends in one line on stderr, `error: …`. `SPARSIFY_DEBUG=1` prints the traceback before it. It holds for all commands,
however they are started (`sparsify`, `python -m sparsify.cli`), because it is what the command classes below do in `main`:

    app = typer.Typer(cls=RuledGroup)             several commands
    @app.command(cls=RuledCommand)                an app of one command
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparsify.console import adapt_streams, visible
from sparsify.errors import InputError, SparsifyError

FINE, COULD_NOT, BAD_INPUT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
LONGEST = 800  # characters of an error that are printed
DEBUG = "SPARSIFY_DEBUG"

WORK_FAILED = frozenset(
    number
    for number in (
        getattr(errno, name, None)
        for name in ("ENOSPC", "EDQUOT", "EIO", "EMFILE", "ENFILE", "ENOMEM", "EFBIG", "EAGAIN", "ETIMEDOUT", "ESTALE")
    )
    if number is not None
)
"""Errors of the operating system that say nothing about what was given. All others are about a path that the user named."""

UsageProblem: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What the parser of options raises. Typer has it from click, or carries a copy of its own, depending on its version."""


class Stopped(Exception):
    """Carries Ctrl-C or a reader that went away past typer, which would end the process in its own way."""


class _Ruled:
    """Mixed into typer's command classes: `main` ends by the rule, unless the caller asks for exceptions (`standalone_mode=False`)."""

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        def body() -> Any:
            return super(_Ruled, self).main(  # type: ignore[misc]
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )

        if standalone_mode:
            sys.exit(run(body))
        try:
            return body()
        except Stopped as stop:
            raise stop.args[0] from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except (BrokenPipeError, KeyboardInterrupt) as error:
            raise Stopped(error) from error


class RuledGroup(_Ruled, TyperGroup):
    """Commands that end by the rule."""


class RuledCommand(_Ruled, TyperCommand):
    """A command that ends by the rule."""


def run(body: Callable[[], Any]) -> int:
    """Call `body` and return the exit code; what went wrong is said on stderr. A number that `body` returns is its exit code."""
    adapt_streams()
    with short_warnings(), no_logging():
        try:
            result = body()
            _flush()
            return result if isinstance(result, int) else FINE
        except (Exception, KeyboardInterrupt) as raised:
            error = raised.args[0] if isinstance(raised, Stopped) else raised
            code, text = verdict(error)
            with contextlib.suppress(OSError, ValueError):  # nobody reads stderr: the exit code remains
                if debugging():
                    traceback.print_exception(error)
                if text:
                    typer.echo(text, err=True)
            try:
                _flush()
            except (OSError, ValueError):
                _drop_output()
            return code


def debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code of an exception, and the line that is printed; nothing for output that nobody reads."""
    if isinstance(error, BrokenPipeError):
        return UNREAD, ""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "; ".join(["interrupted", *getattr(error, "__notes__", ())])
    if isinstance(error, typer.Abort):
        return COULD_NOT, "error: nothing to read on stdin"
    if isinstance(error, UsageProblem):
        context = getattr(error, "ctx", None)
        hint = f" ({context.command_path} --help says more)" if context is not None else ""
        return BAD_INPUT, f"error: {line_of(error.format_message().rstrip('.'))}{hint}"  # type: ignore[attr-defined]
    if work_failed(error):
        return COULD_NOT, f"error: {reason(error)}"
    if isinstance(error, SparsifyError):
        return error.exit_code, f"error: {reason(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        return BAD_INPUT, f"error: {reason(error)}"
    if isinstance(error, ImportError):
        return COULD_NOT, f"error: {reason(error)}"
    return COULD_NOT, f"error: {type(error).__name__}: {reason(error)} (unexpected: {DEBUG}=1 shows where)"


def work_failed(error: BaseException | None) -> bool:
    """Whether a full disk, missing memory and the like are behind an error, at any distance."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in WORK_FAILED):
            return True
        if isinstance(error, RuntimeError) and out_of_memory(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def out_of_memory(text: str) -> bool:
    """torch says it in words only."""
    return any(
        words in text for words in ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate")
    )


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(str(error))):
        return "out of memory" + (f" ({line_of(str(error))})" if str(error) else "")
    if isinstance(error, OSError) and error.strerror:
        places = [os.fsdecode(p) if isinstance(p, bytes) else str(p) for p in (error.filename, error.filename2) if p]
        return line_of(f"{' → '.join(places)}: {error.strerror}" if places else error.strerror)
    if isinstance(error, KeyError) and error.args:
        return line_of(f"no {error.args[0]!r}")
    return line_of(str(error)) or type(error).__name__


def line_of(text: str) -> str:
    """`text` in one line of at most about `LONGEST` characters: the beginning says what, the end says what to do."""
    line = visible(" ".join(text.split()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 4 :]}"


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside, a library reads something that the user gave: whatever it raises is an InputError that begins with `what`.

    Not so for errors of ours, a package that is not installed, and failures that say nothing about the input.
    """
    try:
        yield
    except (SparsifyError, ImportError):
        raise
    except Exception as error:
        if work_failed(error):
            raise
        raise InputError(f"{what}: {reason(error)}") from error


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Inside, warnings of ours are one line on stderr, `warning: …`; those of other packages wait for SPARSIFY_DEBUG."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            if category.__module__.startswith("sparsify") or os.path.abspath(filename).startswith(ours + os.sep):
                typer.echo(f"warning: {line_of(str(message))}", err=True)
            elif debugging():
                before(message, category, filename, lineno, file, line)

        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def no_logging() -> Iterator[None]:
    """Inside, what libraries log below an error waits for SPARSIFY_DEBUG: it is not about what was given."""
    before = logging.root.manager.disable
    logging.disable(before if debugging() else max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _flush() -> None:
    """So that a reader who is gone, or a full disk, is noticed here and not while Python exits."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _drop_output() -> None:
    """What is still to be written goes nowhere: Python would try again at exit, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
