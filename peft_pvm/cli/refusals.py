"""How a command ends if it cannot do what it was asked: with one sentence on standard error, without a traceback.

Exit codes are 2 where the command line is wrong, 1 where it could not be done, 130 after Ctrl+C. An error that is none
of `REFUSALS` is a fault of ours and keeps its traceback; `PEFT_PVM_DEBUG=1` shows that of any error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from typer import Abort, BadParameter
from typer.core import TyperGroup

from ..utils.terminal import say
from ..utils.text import LONGEST


CommandLineError: Any = BadParameter.__mro__[2]  # whose public name depends on typer's version
DEBUG = "PEFT_PVM_DEBUG"
REFUSALS = (ImportError, MemoryError, NotImplementedError, OSError, SafetensorError, ValueError)
WORDLESS = (json.JSONDecodeError, SafetensorError, UnicodeError)  # refusals that tell a user nothing
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch's, which is a RuntimeError as many others are
INTERRUPTED = 130
LONGEST_WORD = 300  # characters: a value must not hide what is accepted


# What a folder must hold, by what it should be, and what one of another kind holds.
MODEL_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
HOLDS = {
    "a model that reads images": (MODEL_FILE, ADAPTER_FILE),
    "a base model": (MODEL_FILE, ADAPTER_FILE),
    "an adapter": (ADAPTER_FILE, MODEL_FILE),
    "an adapter of PVM": (ADAPTER_FILE, MODEL_FILE),
}
INSTEAD = {
    MODEL_FILE: "a model, not {}. Models go by --model or --base.",
    ADAPTER_FILE: "an adapter, not {}. Give its base model here, and the adapter beside it.",
}
# Endings and first folders of what is never taken for a Hub id.
OF_FILES = (".csv", ".json", ".jsonl", ".parquet", ".safetensors")
OF_THE_REPOSITORY = ("adapters", "examples", "experiments", "runs")


@contextlib.contextmanager
def reading(what: str, *sources: str | os.PathLike) -> Iterator[None]:
    """Turn the errors that other packages raise while they read files into errors that say what is wrong.

    Args:
        what: What they should be, for the error.
        sources: Folders, files or Hub ids.

    Raises:
        ValueError: One cannot be read. Errors that already say so in words stay as they are.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for source in sources:
        check_there(what, os.fspath(source))
    try:
        yield
    except Exception as error:
        names = " or ".join(os.fspath(source) for source in sources)
        if not isinstance(error, REFUSALS) or isinstance(error, WORDLESS):
            raise ValueError(
                f"{names} cannot be read as {what} ({type(error).__name__}: {error}). {DEBUG}=1 shows where."
            ) from error
        absent = [os.fspath(source) for source in sources if not os.path.exists(source)]
        if absent and _comes_of(error, (ConnectionError, EntryNotFoundError, HfHubHTTPError, HFValidationError)):
            missing = " or ".join([name for name in absent if name in str(error)] or absent)
            raise ValueError(
                f"There is no folder or file {missing} here, and the Hub did not give it: {str(error).strip(' .')}. "
                "Check the spelling and the connection. What is private needs `hf auth login`."
            ) from error
        if getattr(error, "filename", None) or any(os.fspath(source) in str(error) for source in sources):
            raise
        raise ValueError(f"{names}: {str(error).strip()}") from error


def check_there(what: str, source: str) -> None:
    """Refuse a path that does not exist, without asking the Hub, and a folder of another kind.

    Args:
        what: What it should be.
        source: A folder, a file or a Hub id.

    Raises:
        FileNotFoundError: It does not exist. The message says what to do.
        ValueError: It is of another kind. The message says what to do.
    """
    path = Path(source)
    if not path.exists():
        is_path = path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2 or path.suffix in OF_FILES
        if is_path or path.parts[0] in OF_THE_REPOSITORY:
            raise FileNotFoundError(f"There is no folder or file {source}. {_where_to_look(what, path)}")
    elif what in HOLDS and path.is_dir():
        needed, other = HOLDS[what]
        inside = sorted(file.parent.name for file in path.glob(f"*/{needed}"))
        if (path / needed).is_file():
            return
        if inside:
            several = ", ".join(inside)
            raise ValueError(f"{source} is not {what}, but holds several: {several}. Name one: {source}/{inside[0]}")
        if (path / other).is_file():
            raise ValueError(f"{source} is {INSTEAD[other].format(what)}")


def _where_to_look(what: str, path: Path) -> str:
    if what == "the real base" or path.parts[:2] == ("runs", "real"):
        return "Make the base first: make real-base, in a checkout of the repository."
    if path.parts[0] in OF_THE_REPOSITORY:
        return f"`{path.parts[0]}/` is in a checkout of the repository."
    return "Check the path." if path.is_absolute() else f"Check the path, which starts at {Path.cwd()}."


def _comes_of(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> bool:
    """Whether an error, or one that it was raised from, is of some kinds."""
    return error is not None and (isinstance(error, kinds) or _comes_of(error.__cause__ or error.__context__, kinds))


class Commands(TyperGroup):
    """Commands that end in this way. All refusals go through here, those of typer and those of the library."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line, and exit."""
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs) or 0  # typer returns the code of an Exit
            sys.stdout.flush()
        except CommandLineError as error:
            status = error.exit_code
            if error.format_message():  # without arguments the help was shown, and there is nothing to add
                _refuse(_usage(error))
        except (Abort, KeyboardInterrupt):
            status = INTERRUPTED
        except BrokenPipeError:  # the reader has seen enough, as `head` does
            status = 1
            _give_up_on_output()
        except Exception as error:
            if os.environ.get(DEBUG) or not is_refusal(error):
                raise
            status = 1
            _refuse(str(error).strip() or type(error).__name__)
            _give_up_on_output()
        if status == INTERRUPTED:
            say("Interrupted.", err=True)
        if standalone_mode:
            sys.exit(status)
        return status


def is_refusal(error: Exception) -> bool:
    """Whether an error tells a user what cannot be done, and is not a bug of this package."""
    return isinstance(error, REFUSALS) or any(text in str(error) for text in OUT_OF_MEMORY)


def _refuse(message: str) -> None:
    message = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: f"{word[0][:100]}...{word[0][-20:]}", message)
    say(f"Error: {message if len(message) <= LONGEST else message[:LONGEST] + ' ...'}", err=True)


def _usage(error: Any) -> str:
    """What is wrong with the command line, with the value: where pydantic read it, the message does not name it."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    problems: list[Any] = getattr(error.__cause__, "errors", list)()
    if problems and repr(problems[0]["input"]) not in message:
        message += f", not {problems[0]['input']!r}"
    context = getattr(error, "ctx", None)
    message += "" if message.endswith("?") else "."
    return message + (f" See {context.command_path} --help." if context else "")


def _give_up_on_output() -> None:
    """Drop what standard output does not take: Python would try to write it when it exits, and fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
