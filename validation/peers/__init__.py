"""Other people's implementations behind the harness's interface, each in a file of its own."""
