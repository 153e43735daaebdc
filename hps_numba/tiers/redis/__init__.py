"""The Redis tier: a volatile database that many servers share."""
