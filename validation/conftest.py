"""How many examples property tests try: `--hypothesis-profile=thorough` for many, and for others than the last time.

It stands here because pytest reads this file before Hypothesis looks for the profile, whatever part of the tests runs.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    max_examples=20,
    deadline=None,  # a first call may compile
    # The fixtures of a test are settings that its examples share.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("repeatable"), derandomize=False, max_examples=500)
settings.load_profile("repeatable")
