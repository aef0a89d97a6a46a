"""Texts of the user interface, in English and Chinese.

``core/messages/en/AREA.py`` and ``zh/AREA.py`` each hold a dictionary ``TEXTS`` of templates; a key
is ``AREA.name``. The language is ``--lang``, else ``FINITUNE_LANG``, else ``LC_ALL``/``LANG``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

LANGUAGES = ("en", "zh")

_chosen: list[str] = []


def set_language(name: str | None) -> None:
    """Choose the language for this process; None returns to the environment's."""
    _chosen.clear()
    if name:
        _chosen.append(_known(name))


def language() -> str:
    """The language in force, "en" or "zh"."""
    if _chosen:
        return _chosen[0]
    for variable in ("FINITUNE_LANG", "LC_ALL", "LANG"):
        value = os.environ.get(variable, "")
        if value:
            return _known(value)
    return "en"


def _known(name: str) -> str:
    return "zh" if name.lower().startswith("zh") else "en"


@cache
def _texts(lang: str, area: str) -> Mapping[str, str]:
    texts: Mapping[str, str] = importlib.import_module(f"finitune.core.messages.{lang}.{area}").TEXTS
    return texts


def text(key: str, **data: Any) -> str:
    """The text of ``AREA.name`` filled with ``data``. Raises KeyError for an unknown key."""
    from finitune.core.codes import fill

    template = _texts(language(), key.partition(".")[0])[key]
    return fill(template, data)
