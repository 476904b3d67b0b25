"""The launcher: reads a cluster file and a device list, starts the processes and ends them. Imports no torch."""

__version__ = "0.1.0"
