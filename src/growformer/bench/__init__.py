"""The benchmark of growing: suites of training runs at equal cost, and what may be said of their results."""
