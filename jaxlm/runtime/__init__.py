"""Processes, devices, the mesh, launchers, chips and compiler options."""
