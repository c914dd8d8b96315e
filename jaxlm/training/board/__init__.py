"""The board is a page that shows runs while they train, and a finished run in a file of its own."""
