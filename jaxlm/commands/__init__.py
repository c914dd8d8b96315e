"""The command line has one file a command; `cli.py` dispatches to them."""
