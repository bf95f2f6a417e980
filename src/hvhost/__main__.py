"""``python -m hvhost`` is the ``hvhost`` command."""

from __future__ import annotations

from hvhost.cli.main import main

if __name__ == "__main__":
    main()
