"""How long hypothesis looks for a counterexample: in `make test`, `make fuzz`, and under the sanitizers."""

from hypothesis import HealthCheck, settings

from longer import IS_LONG

# Chosen by --hypothesis-profile. A test's device stays what it is from example to example.
settings.register_profile("fuzz", deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
settings.register_profile(
    "test", settings.get_profile("fuzz"), max_examples=25 if IS_LONG else 8, derandomize=True, database=None
)
settings.register_profile("sanitized", settings.get_profile("test"), max_examples=8)
settings.load_profile("test")
