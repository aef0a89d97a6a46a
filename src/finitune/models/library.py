"""transformers and peft, kept quiet: our reports replace their bars, log lines and advice to developers."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines below errors and no FutureWarning inside; all are restored.

    Warning filters belong to the whole process: outside the main thread they are left alone.
    """
    from transformers.utils import logging as untyped

    logging: Any = untyped

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if threading.current_thread() is not threading.main_thread():
            yield
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
