"""The runtime is what a program runs on: processes, devices, the mesh, launchers, chips and compiler options."""
