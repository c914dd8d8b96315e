"""Makes weights small: what is recorded of their inputs, and solvers that are pure functions of one weight and that."""
