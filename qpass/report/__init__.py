"""Reports: what the command line prints (`text`, `explain`) and the page that it writes (`page`)."""

from qpass.report.explain import about_site, explained, misses
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
)

__all__ = [
    "about_site",
    "as_json",
    "calibrated",
    "console",
    "explained",
    "facts",
    "inspected",
    "misses",
    "presets",
    "profile",
    "remarks_on_sites",
    "rewritten",
    "rules",
    "sizes",
    "stats_of",
    "summary",
    "verified",
]
