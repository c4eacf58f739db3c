"""Where commands print: results on stdout, what is told on the way on stderr."""

from __future__ import annotations

import os
import sys

from rich.console import Console

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110, highlight=False)
errors = Console(stderr=True)
