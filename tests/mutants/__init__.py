"""Mutation testing: faults planted in the sources, and the tests that notice them."""
