"""What the fuzzers share: atheris around functions that take bytes and may raise nothing.

``python fuzz/fuzz_NAME.py [libFuzzer options] [corpus]``. Without a corpus, what was found is kept
in ``build/fuzz/NAME``, and the next run begins with it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


def fuzz(module: str, *names: str) -> None:
    """Fuzz functions of *module*; of several, the first byte of an input chooses one."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed; install it with: pip install 'hvhost[fuzz]'")
    # Each input is a violation or two, and writing them down takes longer than to find them.
    logging.getLogger("hvhost").addHandler(logging.NullHandler())
    with atheris.instrument_imports(include=["hvhost"]):
        loaded = importlib.import_module(module)
    targets = [getattr(loaded, name) for name in names]

    def one_input(data: bytes) -> None:
        if len(targets) == 1:
            targets[0](data)
        elif data:
            targets[data[0] % len(targets)](data[1:])

    arguments = list(sys.argv)
    if not any(not word.startswith("-") for word in arguments[1:]):
        corpus = ROOT / "build" / "fuzz" / Path(arguments[0]).stem.removeprefix("fuzz_")
        corpus.mkdir(parents=True, exist_ok=True)
        arguments.append(str(corpus))
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()
