"""The validation harness: what correct means, how close is close enough, and the tests that ask."""
