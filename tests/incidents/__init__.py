"""End-to-end: one planted fault of each class, on both ports; what is found, what is done, what is not said."""
