"""What all tests have."""

pytest_plugins = ("tests.support.fakegpu.plugin",)
