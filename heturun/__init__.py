"""The launcher: reads a cluster file and a device list, starts the processes and ends them. Imports no torch."""

from pipeline.core.version import VERSION as __version__

__all__ = ["__version__"]
