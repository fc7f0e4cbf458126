"""The command line as `python -m qpass`, for where scripts are not on the PATH."""

from qpass.cli import main

main()
