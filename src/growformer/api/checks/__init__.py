"""What `check_family` is made of: samples, cover, order, growths, controls, and the process that verifies."""
