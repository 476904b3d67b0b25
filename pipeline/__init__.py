"""Pipeline-parallel training on uneven machines: schedules, stages, transports and the loop that drives them.

Importing this package is cheap and imports no torch; take what you need from its modules.
"""
