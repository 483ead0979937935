"""The version of the package, as files, reports and the command line say it."""

__version__ = "0.1.0"
