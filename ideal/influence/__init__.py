"""From a model to the table of influences: gradients, curvature, solvers, products."""
