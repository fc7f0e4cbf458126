"""Reports: what the command line prints (`text`, `explain`) and the page that it writes (`page`)."""

from qpass.report.explain import about_site, explained, misses
from qpass.report.page import check_place, page_data, render, write_page
from qpass.report.text import (
    as_json,
    calibrated,
    console,
    facts,
    inspected,
    presets,
    profile,
    remarks_on_sites,
    rewritten,
    rules,
    sizes,
    stats_of,
    summary,
    verified,
    verified_engine,
)

__all__ = [
    "about_site",
    "as_json",
    "calibrated",
    "check_place",
    "console",
    "explained",
    "facts",
    "inspected",
    "misses",
    "page_data",
    "presets",
    "profile",
    "remarks_on_sites",
    "render",
    "rewritten",
    "rules",
    "sizes",
    "stats_of",
    "summary",
    "verified",
    "verified_engine",
    "write_page",
]
