"""Implementations that ship with the harness: a module for each, with a function of the module's name that makes it."""
