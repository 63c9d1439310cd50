"""`sepo report`: what the scorer and the training saw, as one page, as figures or as JSON."""

from sepo.report.collect import collect
from sepo.report.html import render_page

__all__ = ["collect", "render_page"]
