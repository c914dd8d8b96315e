"""A plan says what a program costs on machines that aren't here: compiled ahead of time, or by arithmetic."""
