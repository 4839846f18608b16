"""Reports: one self-contained HTML page for each kind of result (`pip install 'saccade[report]'`)."""

from __future__ import annotations

from saccade.report.comparison import render_page, write_page

__all__ = ["render_page", "write_page"]
