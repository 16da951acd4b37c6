"""Other people's implementations behind the harness's interface, each a file; `validation.implementations` lists them."""
