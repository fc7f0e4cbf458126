"""Activation statistics: what the Linears of a model read while it runs over samples."""

from qpass.calibrate.run import calibrate
from qpass.calibrate.sources import Header, NpzFiles, Source
from qpass.calibrate.statistics import ActivationStats, Histogram
from qpass.calibrate.stats import Stats

__all__ = ["ActivationStats", "Header", "Histogram", "NpzFiles", "Source", "Stats", "calibrate"]
